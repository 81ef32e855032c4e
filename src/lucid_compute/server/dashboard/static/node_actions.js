// What can be done to a node: drain and resume it, end it, try to reach it, and change what it states.
import { Confirm, Dialog, Field, Refusal, Undo, typedNumber, useAction } from "./acting.js";
import { count, plural } from "./format.js";
import { Fragment, html, useState } from "./html.js";
import { retryAll } from "./polling.js";
import { changeQuery } from "./router.js";

const WAIT_SECONDS = 5; // for requests in flight, before an end is refused

const done = () => retryAll();

// The buttons of a node's page. `health` is as it was last read, so what is in flight is live in every dialog.
export function NodeActions({ api, node, health, declaration, onProbe, asked = "" }) {
  const [open, setOpen] = useState(asked);
  const [undo, setUndo] = useState(null); // {text, run} of the last change
  const close = () => {
    setOpen("");
    changeQuery({ do: "" });
  };
  const resuming = useAction(() => api.change("POST", `/compute/resume/${node.id}`));
  const resume = async () => (await resuming.start()) && done();
  const isDraining = health.status === "draining" || health.reasons.some(({ code }) => code === "DRAINING");
  return html`<div class="actions" role="group" aria-label="Actions">
    ${isDraining
      ? html`<button type="button" onClick=${resume} disabled=${resuming.isBusy}>Resume</button>`
      : html`<button type="button" onClick=${() => setOpen("drain")}>Drain</button>`}
    <button type="button" onClick=${onProbe}>Probe</button>
    <button type="button" onClick=${() => setOpen("edit")}>Price and limit</button>
    <button type="button" onClick=${() => setOpen("models")}>Models</button>
    <button type="button" class="quiet tone-bad" onClick=${() => setOpen("deregister")}>Deregister</button>
    <${Refusal} error=${resuming.error} />
    ${isDraining && html`<p class="note" role="status">${health.inFlight > 0 ? `Draining: ${plural(health.inFlight, "request")} in flight.` : health.drained ? "Drained: no request runs on it. Resume takes it back." : "Draining."}</p>`}
    ${resuming.result && health.reported?.status === "draining" && html`<p class="note" role="status">The node itself reports that it drains. It is sent requests again when it reports otherwise.</p>`}
    ${undo && html`<${Undo} text=${undo.text} run=${undo.run} onEnd=${() => setUndo(null)} key=${undo.at} />`}
    ${open === "resume" && html`<${Confirm} title=${`Resume ${node.name}`} action="Resume" onClose=${close} onDone=${done} run=${() => api.change("POST", `/compute/resume/${node.id}`)}><p>It is sent requests again, unless it reports a drain itself.</p></${Confirm}>`}
    ${open === "drain" && html`<${Drain} api=${api} node=${node} health=${health} onClose=${close} />`}
    ${open === "deregister" && html`<${Deregister} api=${api} node=${node} health=${health} onClose=${close} />`}
    ${open === "edit" && html`<${Terms} api=${api} node=${node} onClose=${close} onUndo=${setUndo} />`}
    ${open === "models" && html`<${Declared} api=${api} node=${node} models=${declaration?.models ?? []} onClose=${close} onUndo=${setUndo} />`}
  </div>`;
}

function Drain({ api, node, health, onClose }) {
  return html`<${Confirm} title=${`Drain ${node.name}`} action="Drain" onClose=${onClose} onDone=${done} run=${() => api.change("POST", `/compute/drain/${node.id}`)}>
    <p>It is sent no more requests. ${inFlightText(health.inFlight)} Resume takes it back.</p>
  </${Confirm}>`;
}

const inFlightText = (number) => (number > 0 ? `${plural(number, "request")} in flight now ${number === 1 ? "ends" : "end"} as usual.` : "No request is in flight now.");

function Deregister({ api, node, health, onClose }) {
  const [isForced, setForced] = useState(false);
  const run = () => api.change("POST", `/compute/deregister/${node.id}`, undefined, { query: { waitSeconds: WAIT_SECONDS, force: isForced || "" } });
  return html`<${Confirm} title=${`Deregister ${node.name}`} action="Deregister" word=${node.name} onClose=${onClose} onDone=${done} run=${run}>
    <p>This is final: the node ends, and only its records stay. ${health.inFlight > 0 ? `${plural(health.inFlight, "request")} ${health.inFlight === 1 ? "is" : "are"} in flight now. The service waits ${WAIT_SECONDS} s for them, and refuses if one is left.` : "No request is in flight now."}</p>
    <p class="note">To stop it for a while, drain it instead: a drain can be undone.</p>
    ${health.inFlight > 0 && html`<label class="check"><input type="checkbox" checked=${isForced} onChange=${(event) => setForced(event.currentTarget.checked)} /> Cut off the requests in flight</label>`}
  </${Confirm}>`;
}

const TERMS = ["pricePer1kTokens", "maxConcurrency", "region"];

function Terms({ api, node, onClose, onUndo }) {
  const { pricePer1kTokens, maxConcurrency, region } = node.metadata;
  const [terms, setTerms] = useState({ pricePer1kTokens: pricePer1kTokens ?? "", maxConcurrency: maxConcurrency ?? "", region: region ?? "" });
  const change = (name) => (value) => setTerms((former) => ({ ...former, [name]: value }));
  const former = Object.fromEntries(TERMS.map((name) => [name, node.metadata[name] ?? null]));
  const save = (metadata) => api.change("PATCH", `/passports/${node.id}`, { metadata });
  const saving = useAction(() => save({
    pricePer1kTokens: terms.pricePer1kTokens === "" ? null : String(terms.pricePer1kTokens),
    maxConcurrency: terms.maxConcurrency === "" ? null : typedNumber(terms.maxConcurrency),
    region: terms.region === "" ? null : terms.region,
  }));
  const submit = async (event) => {
    event.preventDefault();
    if ((await saving.start()) === undefined) return;
    done();
    onUndo({ at: Date.now(), text: "Price and limit were saved.", run: () => save(former) });
    onClose();
  };
  return html`<${Dialog} title=${`Price and limit of ${node.name}`} onClose=${onClose}><form onSubmit=${submit}>
    <${Field} name="pricePer1kTokens" label="US dollars for 1,000 tokens" hint="empty: its requests cost nothing" inputmode="decimal" value=${terms.pricePer1kTokens} onInput=${change("pricePer1kTokens")} error=${saving.error} autofocus />
    <${Field} name="maxConcurrency" label="Requests at once, at most" hint="empty: no limit" inputmode="numeric" value=${terms.maxConcurrency} onInput=${change("maxConcurrency")} error=${saving.error} />
    <${Field} name="region" label="Region" value=${terms.region} onInput=${change("region")} error=${saving.error} />
    <p class="note">An agent that is started with another value of its own overwrites it.</p>
    <${Refusal} error=${saving.error} except=${TERMS} />
    <div class="dialog-buttons"><button type="button" onClick=${onClose}>Cancel</button><button type="submit" class="primary" disabled=${saving.isBusy}>Save</button></div>
  </form></${Dialog}>`;
}

// The models that a node declares: the whole list is replaced.
function Declared({ api, node, models, onClose, onUndo }) {
  const [lines, setLines] = useState(models.map(({ id, maxTokens, quantization }, number) => ({ number, id, maxTokens: maxTokens ?? "", quantization: quantization ?? "" })));
  const change = (number, name) => (event) => setLines(lines.map((line) => (line.number === number ? { ...line, [name]: event.target.value } : line)));
  const add = () => setLines([...lines, { number: Math.max(-1, ...lines.map((line) => line.number)) + 1, id: "", maxTokens: "", quantization: "" }]);
  const declare = (declared) => api.change("PUT", `/compute/models/${node.id}`, { models: declared.map(({ id, maxTokens, quantization }) => ({
    id, ...((maxTokens ?? "") === "" ? {} : { maxTokens: typedNumber(String(maxTokens)) }), ...((quantization ?? "") === "" ? {} : { quantization }),
  })) });
  const saving = useAction(() => declare(lines));
  const submit = async (event) => {
    event.preventDefault();
    if ((await saving.start()) === undefined) return;
    done();
    onUndo({ at: Date.now(), text: "Its models were saved.", run: () => declare(models) });
    onClose();
  };
  return html`<${Dialog} title=${`Models that ${node.name} declares`} onClose=${onClose} wide><form onSubmit=${submit}>
    <p class="note">What it can serve, by the ids that its server knows. An agent that runs declares its models again when they change.</p>
    ${lines.map((line) => html`<div class="model-line" key=${line.number}>
      <input aria-label="Id of the model" placeholder="id" required value=${line.id} onInput=${change(line.number, "id")} />
      <input aria-label="Tokens at most" placeholder="tokens at most" inputmode="numeric" pattern="[0-9]*" value=${line.maxTokens} onInput=${change(line.number, "maxTokens")} />
      <input aria-label="Quantization" placeholder="quantization" value=${line.quantization} onInput=${change(line.number, "quantization")} />
      <button type="button" class="quiet" aria-label=${`Remove ${line.id || "this line"}`} onClick=${() => setLines(lines.filter((each) => each.number !== line.number))}>✕</button>
    </div>`)}
    <div><button type="button" onClick=${add}>Add a model</button></div>
    <${Refusal} error=${saving.error} />
    <div class="dialog-buttons"><button type="button" onClick=${onClose}>Cancel</button><button type="submit" class="primary" disabled=${saving.isBusy}>Save</button></div>
  </form></${Dialog}>`;
}
