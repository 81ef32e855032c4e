// What a node is and serves, whether it can be reached, and whether it would be sent a request now.
import { Refusal } from "./acting.js";
import { count, dollars, duration, milliseconds, moment } from "./format.js";
import { html } from "./html.js";
import { Card, Empty, Shown, Table } from "./parts.js";
import { usePolled } from "./polling.js";
import { addressOf } from "./router.js";

const SECONDS = 10;
const SHOWN = 50; // models in the table
const MOST = 5; // models that are asked about

export const runtimesOf = ({ runtimes = [] }) => runtimes.map((one) => (one.name ? [one.name, one.version].filter(Boolean).join(" ") : one)).join(", ");

export function NodeFacts({ node, health, declaration, probing }) {
  const { metadata } = node;
  const facts = [
    ["URL", html`<code>${metadata.inferenceUrl}</code>`],
    ["Runtime", runtimesOf(metadata) || health.reported?.runtime?.name],
    ["Price", metadata.pricePer1kTokens ? `${dollars(metadata.pricePer1kTokens)} for 1,000 tokens` : "none"],
    ["Requests at once", metadata.maxConcurrency ? `${count(metadata.maxConcurrency)} at most` : "no limit"],
    ["Context", metadata.maxContext ? `${count(metadata.maxContext)} tokens` : null],
    ["Capabilities", (metadata.capabilities ?? []).join(", ")],
    ["Registered", moment(node.createdAt)],
    ["Last probe", html`<${Probe} probing=${probing} />`],
  ];
  return html`<${Card} title="What it is">
    <dl class="facts">${facts.filter(([, value]) => value).map(([label, value]) => html`<div key=${label}><dt>${label}</dt><dd>${value}</dd></div>`)}</dl>
    <h3 class="apart">Models</h3>
    <${Shown} of=${declaration} lines=${2}>${(data) => html`<${Table} caption="Models that it declares" columns=${modelColumns(health)} rows=${data.models.slice(0, SHOWN)} keyOf=${(model) => model.id} empty=${html`<${Empty} title="It declares no model, so no request is sent to it." />`} />${data.models.length > SHOWN && html`<p class="note">${count(data.models.length - SHOWN)} more are declared.</p>`}`}</${Shown}>
  </${Card}>`;
}

const modelColumns = (health) => [
  ["Model", (model) => (model.modelPassportId ? html`<a href=${addressOf(`/models/${model.modelPassportId}`)}>${model.id}</a>` : model.id)],
  ["Loaded", (model) => (health.availableModels.includes(model.id) ? "yes" : "no")],
  ["Tokens at most", (model) => count(model.maxTokens), "right"],
  ["Quantization", (model) => model.quantization ?? "–"],
  ["Registered", (model) => (model.modelPassportId ? "yes" : html`<span class="tone-warn">no: nobody can ask for it</span>`)],
];

// What a probe found. The service keeps none: this one was asked for on this page.
function Probe({ probing }) {
  if (probing.isBusy) return html`<span role="status">The service connects to it…</span>`;
  if (probing.error) return html`<${Refusal} error=${probing.error} />`;
  const found = probing.result;
  if (!found) return html`<span class="note">none since this page was opened</span>`;
  const times = [found.connectMs === null ? "" : `connected in ${milliseconds(found.connectMs)}`, found.answerMs === null ? "" : `answered in ${milliseconds(found.answerMs)}`, found.tls?.version ?? ""];
  return html`<span role="status"><span class=${found.reachable ? "tone-good" : "tone-bad"}>${found.reachable ? "● reached" : "▲ not reached"}</span> ${found.message} <span class="note">${[...times, moment(found.checkedAt)].filter(Boolean).join(" · ")}</span></span>`;
}

// For each of its models: would it get the next request, and if not, every reason: its breaker among them.
export function NextRequest({ api, node, health, declaration }) {
  const declared = (declaration.data?.models ?? []).filter(({ modelPassportId }) => modelPassportId).map(({ id }) => id);
  const names = [...new Set([...declared, ...health.availableModels])].slice(0, MOST);
  const answers = usePolled((signal) => matchesOf(api, node.id, names, signal), SECONDS, [api, node.id, names.join()]);
  if (names.length === 0) return null;
  return html`<${Card} title="Would it be sent a request now?" aside=${html`<span class="note">as this replica decides, for this key</span>`}>
    <${Shown} of=${answers} lines=${2}>${(data) => html`<ul class="list">${data.map((answer, place) => html`<li key=${names[place]}><strong>${names[place]}</strong> <${Answer} answer=${answer} /></li>`)}</ul>`}</${Shown}>
  </${Card}>`;
}

async function matchesOf(api, id, names, signal) {
  const answers = await Promise.all(names.map((model) => api.change("POST", "/match", { model }, { signal }).catch((error) => {
    if (error.status !== 404) throw error;
    return { error };
  })));
  return answers.map(({ shortlist, rejected, error }) => {
    if (error) return { error };
    const place = shortlist.findIndex(({ passportId }) => passportId === id);
    return { place, of: shortlist.length, wait: shortlist[place]?.score ?? null, reasons: rejected.find(({ passportId }) => passportId === id)?.reasons ?? null };
  });
}

function Answer({ answer }) {
  const { place, of, wait, reasons, error } = answer;
  if (error) return html`<span class="tone-warn">◆ ${error.message}</span>`;
  if (place >= 0) return html`<span class="tone-good">● yes</span> <span class="note">place ${place + 1} of ${of} by expected wait${wait === null ? "" : `, ${milliseconds(wait)}`}</span>`;
  if (reasons === null) return html`<span class="note">It is not among the first hundred of either list.</span>`;
  return html`<span class="tone-bad">▲ no</span> <ul class="reasons">${reasons.map((reason) => html`<li key=${reason.code}><span class="code">${reason.code}</span> ${reason.message}${reason.code === "BREAKER_OPEN" && typeof reason.found === "number" ? html` <span class="note">for ${duration(reason.found)} more</span>` : ""}</li>`)}</ul>`;
}
