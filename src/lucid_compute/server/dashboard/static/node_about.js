// What a node is and serves, whether it can be reached, and whether it would be sent a request now.
import { Refusal } from "./acting.js";
import { useMonthOf } from "./earned.js";
import { count, dollars, milliseconds, moment, plural } from "./format.js";
import { Fragment, html } from "./html.js";
import { Card, Empty, Shown, Table } from "./parts.js";
import { usePolled } from "./polling.js";
import { addressOf } from "./router.js";

const SLOW_SECONDS = 60;
const SHOWN = 50; // models in the table

export const runtimesOf = ({ runtimes = [] }) => runtimes.map((one) => (one.name ? [one.name, one.version].filter(Boolean).join(" ") : one)).join(", ");

export function NodeFacts({ api, node, health, declaration, probing, routing }) {
  const month = useMonthOf(api, node.id);
  const { metadata } = node;
  const facts = [
    ["URL", html`<code>${metadata.inferenceUrl}</code>`],
    ["Runtime", runtimesOf(metadata) || health.reported?.runtime?.name],
    ["Price", metadata.pricePer1kTokens ? `${dollars(metadata.pricePer1kTokens)} for 1,000 tokens` : "none"],
    ["Earned this month", month && html`${dollars(month.earned)} <span class="note">of ${dollars(month.charged)} charged</span>`],
    ["Requests at once", metadata.maxConcurrency ? `${count(metadata.maxConcurrency)} at most` : "no limit"],
    ["Context", metadata.maxContext ? `${count(metadata.maxContext)} tokens` : null],
    ["Capabilities", (metadata.capabilities ?? []).join(", ")],
    ["Registered", moment(node.createdAt)],
    ["Breaker", breakerOf(routing)],
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

// What the last probe from this tab found; the service keeps none.
function Probe({ probing }) {
  if (probing.isBusy) return html`<span role="status">The service connects to it…</span>`;
  if (probing.error) return html`<${Refusal} error=${probing.error} />`;
  const found = probing.result;
  if (!found) return html`<span class="note">none in this tab yet</span>`;
  const times = [found.connectMs === null ? "" : `connected in ${milliseconds(found.connectMs)}`, found.answerMs === null ? "" : `answered in ${milliseconds(found.answerMs)}`, found.tls?.version ?? ""];
  return html`<span role="status"><span class=${found.reachable ? "tone-good" : "tone-bad"}>${found.reachable ? "● reached" : "▲ not reached"}</span> ${found.message} <span class="note">${[...times, moment(found.checkedAt)].filter(Boolean).join(" · ")}</span></span>`;
}

// Whether it would get the next request for each of its models, and if not, every reason. Who is idle reads why here.
export function NextRequest({ api, node, health, routing }) {
  const ids = (routing.data?.models ?? []).map(({ modelPassportId }) => modelPassportId);
  const demand = usePolled((signal) => demandOf(api, node.id, ids, signal), SLOW_SECONDS, [api, node.id, ids.join()]);
  return html`<${Card} title="Would it be sent a request now?" aside=${html`<span class="note">as this replica decides</span>`}>
    <${Shown} of=${routing} lines=${2}>${({ models }) => html`<${Fragment}>
      ${health.inFlight === 0 && html`<p><strong>Idle:</strong> ${whyIdle(models, demand.data)}</p>`}
      <ul class="list">${models.map((model) => html`<li key=${model.modelPassportId}><strong>${model.model}</strong> <${Answer} answer=${model} demand=${demand.data?.get(model.modelPassportId)} /></li>`)}</ul>
    </${Fragment}>`}</${Shown}>
  </${Card}>`;
}

// Return the requests of the last hour for each model: on all nodes that this login sees, and on this one.
async function demandOf(api, id, models, signal) {
  const asked = { from: "-1h", series: "requests" };
  const read = async (model) => {
    const [all, own] = await Promise.all([api.get("/compute/metrics", { ...asked, model }, signal), api.get(`/compute/metrics/${id}`, { ...asked, model }, signal)]);
    return [model, { all: all.totals.requests ?? 0, own: own.totals.requests ?? 0 }];
  };
  return new Map(await Promise.all(models.map(read)));
}

// Return in a sentence why no request runs on it.
function whyIdle(models, demand) {
  if (models.length === 0) return "it neither declares nor reports a registered model, so no request can name one of its models.";
  if (models.every(({ reasons }) => reasons.length > 0)) return "it may not be sent requests. The reasons are below.";
  if (!demand) return "it may be sent requests, and none runs at the moment.";
  const [all, own] = [...demand.values()].reduce((sums, each) => [sums[0] + each.all, sums[1] + each.own], [0, 0]);
  if (all === 0) return "nobody asked for its models in the last hour.";
  if (own === 0) return `its models were asked for ${plural(all, "time")} in the last hour, and other nodes are expected to be quicker.`;
  return `it served ${count(own)} of ${plural(all, "request")} for its models in the last hour, and none runs at the moment.`;
}

function Answer({ answer, demand }) {
  const { place, nodes, waitMs, reasons } = answer;
  const asked = demand ? html` <span class="note">${count(demand.own)} of ${plural(demand.all, "request")} for it in the last hour</span>` : "";
  if (reasons.length === 0) return html`<span class="tone-good">● yes</span> <span class="note">${place === null ? "not among the hundred with the shortest wait" : `place ${place} of ${nodes} by expected wait, ${milliseconds(waitMs)}`}</span>${asked}`;
  return html`<span class="tone-bad">▲ no</span>${asked} <ul class="reasons">${reasons.map((reason) => html`<li key=${reason.code + reason.message}><span class="code">${reason.code}</span> ${reason.message}</li>`)}</ul>`;
}

// Whether the node failed so often that it is sent nothing for a while: only known of one that serves a model.
function breakerOf(routing) {
  if (!routing.data) return null;
  const { models, breakerOpenSince, breakerRetryAt } = routing.data;
  if (models.length === 0) return null;
  if (!breakerOpenSince) return "closed: it is sent requests";
  return html`<span class="tone-bad">open since ${moment(breakerOpenSince)}</span> <span class="note">tried again at ${moment(breakerRetryAt)}</span>`;
}
