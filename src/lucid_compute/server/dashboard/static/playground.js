// Chatting with a model as a client does: streamed, with the node that answered, its speed, and the request to copy.
import { Refusal, typedNumber } from "./acting.js";
import { Command } from "./copying.js";
import { count, milliseconds, number } from "./format.js";
import { Fragment, html, useEffect, useRef, useState } from "./html.js";
import { Card, Choice, Empty, Heading, Shown, Table } from "./parts.js";
import { usePolled } from "./polling.js";
import { addressOf, changeQuery } from "./router.js";
import { LANGUAGES, requestIn } from "./snippets.js";

const SECONDS = 10;
const ENDPOINT = "/v1/chat/completions";
const TABS = [["chat", "Chat"], ["why", "Why?"], ["code", "As code"]];

export function PlaygroundView({ api, query }) {
  const served = usePolled((signal) => api.get("/models", { available: "true", perPage: 100 }, signal), SECONDS, [api]);
  const models = (served.data?.models ?? []).filter((one) => one.served).map(({ name }) => name);
  const model = query.model ?? models[0] ?? "";
  const [settings, setSettings] = useState({ system: "", maxTokens: "256", temperature: "" });
  const [turns, setTurns] = useState([]); // {role, content, about, error}
  const tab = TABS.some(([name]) => name === query.tab) ? query.tab : "chat";
  const request = requestOf(model, settings, turns);
  return html`<${Fragment}>
    <${Heading} title="Playground" aside=${html`<${Choice} label="View" options=${TABS} value=${tab} onChange=${(chosen) => changeQuery({ tab: chosen === "chat" ? "" : chosen })} />`} />
    <div class="playground">
      <${Settings} model=${model} models=${models} settings=${settings} onChange=${setSettings} />
      ${tab === "chat" && html`<${Chat} api=${api} model=${model} request=${request} turns=${turns} onTurns=${setTurns} />`}
      ${tab === "why" && html`<${Why} api=${api} model=${model} />`}
      ${tab === "code" && html`<${Code} request=${request} />`}
    </div>
  </${Fragment}>`;
}

function requestOf(model, { system, maxTokens, temperature }, turns) {
  const said = turns.filter(({ error, content }) => !error && content).map(({ role, content }) => ({ role, content }));
  return {
    model,
    messages: [...(system ? [{ role: "system", content: system }] : []), ...said],
    ...(maxTokens ? { max_tokens: typedNumber(maxTokens) } : {}),
    ...(temperature ? { temperature: typedNumber(temperature) } : {}),
  };
}

function Settings({ model, models, settings, onChange }) {
  const change = (name) => (event) => onChange((former) => ({ ...former, [name]: event.target.value }));
  return html`<${Card} title="Request">
    <div class="fields">
      <div class="field"><label for="model">Model</label><input id="model" list="models" value=${model} autocomplete="off" spellcheck=${false} onChange=${(event) => changeQuery({ model: event.currentTarget.value.trim() })} />
        <datalist id="models">${models.map((name) => html`<option value=${name} key=${name}></option>`)}</datalist>
        ${model && html`<span class="note"><a href=${addressOf(`/models/${encodeURIComponent(model)}`)}>Its page</a></span>`}</div>
      <div class="field"><label for="system">Instructions</label><textarea id="system" rows="3" value=${settings.system} onInput=${change("system")}></textarea></div>
      <div class="pair">
        <div class="field"><label for="max-tokens">Tokens out, at most</label><input id="max-tokens" inputmode="numeric" value=${settings.maxTokens} onInput=${change("maxTokens")} /></div>
        <div class="field"><label for="temperature">Temperature</label><input id="temperature" inputmode="decimal" placeholder="the model's" value=${settings.temperature} onInput=${change("temperature")} /></div>
      </div>
    </div>
  </${Card}>`;
}

function Chat({ api, model, request, turns, onTurns }) {
  const [text, setText] = useState("");
  const [isBusy, setBusy] = useState(false);
  const controller = useRef(null);
  const end = useRef();
  useEffect(() => () => controller.current?.abort(), []);
  useEffect(() => {
    end.current?.scrollIntoView({ block: "nearest" });
  }, [turns]);
  const send = async (event) => {
    event.preventDefault();
    const content = text.trim();
    if (!content || isBusy || !model) return;
    controller.current = new AbortController();
    const asked = [...turns, { role: "user", content }];
    const body = { ...request, messages: [...request.messages, { role: "user", content }] };
    const show = (answer) => onTurns([...asked, { role: "assistant", content: "", about: null, ...answer }]);
    setText("");
    setBusy(true);
    show({});
    await answerTo(api, body, controller.current.signal, show);
    setBusy(false);
  };
  return html`<${Card} title="Chat" aside=${turns.length > 0 && html`<button type="button" onClick=${() => onTurns([])} disabled=${isBusy}>Start again</button>`}>
    <div class="chat" role="log" aria-label="Conversation" tabindex="0">
      ${turns.length === 0 && html`<${Empty} title="Say something to the model.">The answer comes as it is made, with the node that made it.</${Empty}>`}
      ${turns.map((turn, place) => html`<${Turn} turn=${turn} key=${place} />`)}
      <span ref=${end}></span>
    </div>
    <form class="say" onSubmit=${send}>
      <input aria-label="Message" placeholder="Message" value=${text} autocomplete="off" onInput=${(event) => setText(event.currentTarget.value)} />
      ${isBusy ? html`<button type="button" onClick=${() => controller.current.abort()}>Stop</button>` : html`<button type="submit" class="primary" disabled=${!model}>Send</button>`}
    </form>
  </${Card}>`;
}

// Show an answer as it comes: its text, and from the first piece on how fast it is.
async function answerTo(api, body, signal, show) {
  const startedAt = performance.now();
  let [content, firstAt, usage, sent] = ["", null, null, null];
  const about = () => ({
    node: sent?.headers.get("x-lucid-node") ?? null,
    job: sent?.headers.get("x-lucid-job") ?? null,
    attempts: sent?.headers.get("x-lucid-attempts") ?? null,
    firstMs: firstAt === null ? null : firstAt - startedAt,
    tokens: usage?.completion_tokens ?? null,
    rate: usage && firstAt !== null && usage.completion_tokens > 1 ? (usage.completion_tokens - 1) / Math.max((performance.now() - firstAt) / 1000, 0.001) : null,
  });
  try {
    await api.stream(ENDPOINT, { ...body, stream: true, stream_options: { include_usage: true } }, signal, (event) => {
      const piece = event.choices?.[0]?.delta?.content ?? "";
      if (piece) firstAt ??= performance.now();
      content += piece;
      usage = event.usage ?? usage;
      show({ content });
    }, (response) => { sent = response; });
    show({ content, about: about() });
  } catch (error) {
    show({ content, about: sent ? about() : null, error: signal.aborted ? null : error, isStopped: signal.aborted });
  }
}

function Turn({ turn }) {
  const { role, content, about, error, isStopped } = turn;
  return html`<div class=${`turn turn-${role}`}>
    <span class="note">${role === "user" ? "you" : "model"}</span>
    <p>${content || (role === "assistant" && !error && !isStopped && !about ? "…" : "")}</p>
    ${isStopped && html`<p class="note">Stopped.</p>`}
    <${Refusal} error=${error} />
    ${about && html`<p class="note">${[
      about.node && html`<a href=${addressOf(`/nodes/${about.node}`)}>node</a>`,
      about.firstMs !== null && `first token after ${milliseconds(about.firstMs)}`,
      about.rate !== null && `${number(about.rate)} tokens a second`,
      about.tokens !== null && `${count(about.tokens)} tokens`,
      about.attempts > 1 && `${about.attempts} attempts`,
      about.job && html`job <code>${about.job}</code>`,
    ].filter(Boolean).map((part, place) => html`${place > 0 ? " · " : ""}${part}`)}</p>`}
  </div>`;
}

// Which node would serve the next request, and why not the others.
function Why({ api, model }) {
  const match = usePolled((signal) => (model ? api.change("POST", "/match", { model }, { signal }) : null), SECONDS, [api, model]);
  if (!model) return html`<${Card} title="Why?"><${Empty} title="Choose a model first." /></${Card}>`;
  return html`<${Card} title="Which node would serve it" aside=${html`<span class="note">least expected wait first; nothing is sent</span>`}>
    <${Shown} of=${match} lines=${4}>${(data) => html`<${Fragment}>
      <${Table} caption="Nodes that may" columns=${MAY} rows=${data.shortlist} keyOf=${(node) => node.passportId} empty=${html`<${Empty} title="No node may serve it now." />`} />
      ${data.rejected.length > 0 && html`<h3 class="apart">Nodes that may not</h3><${Table} caption="Nodes that may not" columns=${MAY_NOT} rows=${data.rejected} keyOf=${(node) => node.passportId} />`}
    </${Fragment}>`}</${Shown}>
  </${Card}>`;
}

const linkOf = (node) => html`<a href=${addressOf(`/nodes/${node.passportId}`)}>${node.name}</a>`;
const MAY = [
  ["Node", linkOf],
  ["Expected wait", (node) => milliseconds(node.score), "right"],
  ["In flight", (node) => count(node.inFlight), "right"],
  ["Queue", (node) => count(node.queueDepth), "right"],
  ["First byte", (node) => milliseconds(node.latencyMs), "right"],
  ["Region", (node) => node.region ?? "–"],
];
const MAY_NOT = [
  ["Node", linkOf],
  ["Why not", (node) => html`<ul class="reasons">${node.reasons.map(({ code, message }) => html`<li key=${code}><span class="code">${code}</span> ${message}</li>`)}</ul>`],
];

function Code({ request }) {
  const [language, setLanguage] = useState("curl");
  const last = request.messages.findLastIndex(({ role }) => role === "user");
  const messages = last < 0 ? [...request.messages, { role: "user", content: "Hello" }] : request.messages.slice(0, last + 1);
  const asked = { ...request, messages };
  return html`<${Card} title="The request as code" aside=${html`<${Choice} label="Language" options=${LANGUAGES} value=${language} onChange=${setLanguage} />`}>
    <${Command} text=${requestIn(language, asked)} what="the code" />
    <p class="note">The key is read from LUCID_API_KEY.</p>
  </${Card}>`;
}
