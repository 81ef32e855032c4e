// What can be done to several nodes of the list, one after the other, with what came of each.
import { Dialog, Field, typedNumber } from "./acting.js";
import { count, milliseconds, plural } from "./format.js";
import { Fragment, html, useState } from "./html.js";
import { retryAll } from "./polling.js";

const WAIT_SECONDS = 5; // for requests in flight, before an end is refused
const NO_TERMS = { pricePer1kTokens: "", maxConcurrency: "", region: "" };

// Each: its verb, what it does, how it is done to one node, whether it is final, and whether it has fields.
const ACTIONS = {
  drain: { verb: "Drain", text: "They are sent no more requests. Those in flight end as usual. Resume takes them back.", undo: "resume", act: (api, id) => api.change("POST", `/compute/drain/${id}`) },
  resume: { verb: "Resume", text: "They are sent requests again, except those that report a drain themselves.", undo: "drain", act: (api, id) => api.change("POST", `/compute/resume/${id}`) },
  probe: { verb: "Probe", text: "The service connects to each of them. Nothing is changed. A host is probed once in ten seconds.", act: probe },
  edit: { verb: "Price and limit", text: "What is left empty stays as it is at each node.", hasTerms: true, act: (api, id, terms) => api.change("PATCH", `/passports/${id}`, { metadata: metadataOf(terms) }) },
  deregister: { verb: "Deregister", text: "They end for good: each waits some seconds for its requests in flight, and is refused if they go on. What they did stays readable.", isFinal: true, act: (api, id) => api.change("POST", `/compute/deregister/${id}`, undefined, { query: { waitSeconds: WAIT_SECONDS }, timeoutMs: 1000 * (WAIT_SECONDS + 15) }) },
};

async function probe(api, id) {
  const found = await api.change("POST", `/compute/probe/${id}`);
  if (!found.reachable) throw new Error(found.message);
  return `reached in ${milliseconds(found.connectMs)}`;
}

const metadataOf = (terms) => Object.fromEntries(Object.entries(terms).filter(([, value]) => value !== "").map(([name, value]) => [name, name === "maxConcurrency" ? typedNumber(value) : value]));

export function BulkActions({ api, nodes, onEnd }) {
  const [name, setName] = useState("");
  return html`<div class="bulk" role="group" aria-label="Actions on the selected nodes">
    <strong>${count(nodes.length)} selected</strong>
    ${Object.entries(ACTIONS).map(([each, { verb, isFinal }]) => html`<button type="button" key=${each} class=${isFinal ? "tone-bad" : ""} onClick=${() => setName(each)}>${verb}</button>`)}
    <button type="button" class="quiet" onClick=${onEnd}>Clear</button>
    ${name && html`<${Bulk} api=${api} action=${ACTIONS[name]} nodes=${nodes} key=${name} onClose=${() => setName("")} onUndo=${setName} onEnd=${onEnd} />`}
  </div>`;
}

function Bulk({ api, action, nodes: selected, onClose, onUndo, onEnd }) {
  const { verb, text, act, undo, isFinal, hasTerms } = action;
  const [terms, setTerms] = useState(NO_TERMS);
  const [typed, setTyped] = useState("");
  const [outcomes, setOutcomes] = useState(null);
  const [begun, setBegun] = useState(null); // the nodes that were selected when it began
  const nodes = begun ?? selected;
  const isOver = outcomes !== null && Object.keys(outcomes).length === nodes.length;
  const word = plural(nodes.length, "node");
  const isReady = outcomes === null && (!isFinal || typed === word) && (!hasTerms || Object.keys(metadataOf(terms)).length > 0);
  const run = async (event) => {
    event.preventDefault();
    if (!isReady) return;
    setBegun(selected);
    setOutcomes({});
    for (const { id } of selected) {
      const outcome = await act(api, id, terms).then((said) => ({ text: typeof said === "string" ? said : "done", tone: "good" }), (error) => ({ text: refusalOf(error), tone: "bad" }));
      setOutcomes((former) => ({ ...former, [id]: outcome }));
    }
    retryAll();
  };
  return html`<${Dialog} title=${`${verb}: ${word}`} onClose=${isOver ? onEnd : onClose}>
    <form onSubmit=${run}>
      <p>${text}</p>
      ${hasTerms && html`<${Terms} terms=${terms} onChange=${setTerms} />`}
      <ul class="list" aria-live="polite">${nodes.map(({ id, name: called, health }) => html`<li key=${id}><strong>${called}</strong> <span class=${outcomes?.[id] ? `tone-${outcomes[id].tone}` : "note"}>${outcomes?.[id]?.text ?? plural(health.inFlight, "request in flight", "requests in flight")}</span></li>`)}</ul>
      ${isFinal && outcomes === null && html`<${Field} name="word" label=${html`To confirm, type <strong>${word}</strong>`} value=${typed} onInput=${setTyped} autofocus />`}
      <div class="dialog-buttons">${isOver
        ? html`<${Fragment}>${undo && html`<button type="button" onClick=${() => onUndo(undo)}>Undo: ${ACTIONS[undo].verb.toLowerCase()} them</button>`}<button type="button" class="primary" onClick=${onEnd}>Close</button></${Fragment}>`
        : html`<${Fragment}><button type="button" onClick=${onClose}>Cancel</button><button type="submit" class=${isFinal ? "danger" : "primary"} disabled=${!isReady}>${outcomes === null ? verb : "…"}</button></${Fragment}>`}</div>
    </form>
  </${Dialog}>`;
}

const refusalOf = (error) => [error.message, ...(error.fields ?? []).map(({ path, message }) => `${path}: ${message}`)].join(" ");

function Terms({ terms, onChange }) {
  const change = (name) => (value) => onChange({ ...terms, [name]: value });
  return html`<${Fragment}>
    <${Field} name="pricePer1kTokens" label="US dollars for 1,000 tokens" inputmode="decimal" value=${terms.pricePer1kTokens} onInput=${change("pricePer1kTokens")} autofocus />
    <${Field} name="maxConcurrency" label="Requests at once, at most" inputmode="numeric" value=${terms.maxConcurrency} onInput=${change("maxConcurrency")} />
    <${Field} name="region" label="Region" value=${terms.region} onInput=${change("region")} />
  </${Fragment}>`;
}
