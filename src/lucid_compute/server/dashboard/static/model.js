// A model: why can't I get it? Node by node, nearest first.
import { curlOf } from "./api.js";
import { Command, Copy } from "./copying.js";
import { inPlace } from "./fixes.js";
import { count, dollars, milliseconds, wholeShare } from "./format.js";
import { Fragment, html } from "./html.js";
import { vramOf } from "./models.js";
import { Card, Choice, Empty, Failure, Heading, Loading, Pager, Shown, SpanChoice, Status, statusOf, Table, Verdict } from "./parts.js";
import { usePolled } from "./polling.js";
import { REQUEST_SERIES, RequestCharts } from "./request_charts.js";
import { addressOf, changeQuery } from "./router.js";
import { nameOf, spanOf } from "./spans.js";

const SECONDS = 5;
const SLOW_SECONDS = 60;
const PER_PAGE = 50;
const WORDS = {
  RUNTIME_MISMATCH: "no runtime for it",
  VRAM_TOO_LOW: "too little VRAM",
  CONTEXT_TOO_SHORT: "too short a context",
  HEARTBEAT_STALE: "heartbeat too old",
  HEARTBEAT_MISSING: "never sent a heartbeat",
  REPORTED_UNHEALTHY: "says it is unhealthy",
  DRAINING: "draining",
  DEREGISTERED: "deregistered",
  PASSPORT_INACTIVE: "passport not active",
};
const COLUMNS = [
  ["Node", (node) => html`<a href=${addressOf(`/nodes/${node.passportId}`)}>${node.name ?? node.passportId}</a>`],
  ["Can run it", (node) => html`<${Verdict} holds=${node.eligible} yes="yes" no="no" />`],
  ["Why not, and what to do", (node) => (node.eligible ? "–" : html`<ul class="reasons">${node.reasons.map((reason) => html`<${Reason} reason=${reason} id=${node.passportId} key=${reason.code} />`)}</ul>`)],
];

export function ModelView({ id, api, query }) {
  const at = encodeURIComponent(id);
  const page = Math.max(1, Number.parseInt(query.page ?? "1", 10) || 1);
  const reason = query.reason in WORDS ? query.reason : "";
  const model = usePolled((signal) => api.get(`/models/${at}`, {}, signal), SLOW_SECONDS, [api, id]);
  const why = usePolled((signal) => api.get(`/models/${at}/availability`, { reason, page, perPage: PER_PAGE }, signal), SECONDS, [api, id, reason, page]);
  const crumbs = [["Models", "/models"]];
  if (model.data === undefined) {
    const name = model.error?.status === 404 ? "No such model" : "Model";
    return html`<${Fragment}><${Heading} title=${name} crumbs=${crumbs} />${model.error ? html`<${Failure} error=${model.error} />` : html`<${Loading} lines=${6} />`}</${Fragment}>`;
  }
  const { metadata, name, owner } = model.data;
  const facts = [metadata.format, metadata.minVramGb ? `${vramOf(metadata.minVramGb)} VRAM` : "", metadata.contextLength ? `${count(metadata.contextLength)} tokens of context` : "", (metadata.runtimes ?? []).join(", "), `owner ${owner}`];
  return html`<${Fragment}>
    <${Heading} title=${name} crumbs=${crumbs} />
    <p class="lead">${facts.filter(Boolean).join(" · ")} <span class="id">${model.data.id}<${Copy} text=${model.data.id} what="the id" /></span></p>
    <${Shown} of=${why} lines=${5}>${(data) => html`<${Fragment}>
      <${Answer} data=${data} name=${name} isHosted=${metadata.format === "api"} />
      ${metadata.format !== "api" && html`<${ServedBy} api=${api} id=${model.data.id} name=${name} aliases=${metadata.aliases ?? []} />`}
      ${metadata.format !== "api" && html`<${Nodes} data=${data} reason=${reason} />`}
    </${Fragment}>`}</${Shown}>
    <${History} api=${api} id=${model.data.id} span=${spanOf(query)} />
  </${Fragment}>`;
}

function Answer({ data, name, isHosted }) {
  const tone = data.served ? "good" : data.available ? "warn" : "bad";
  return html`<section class=${`card answer answer-${tone}`} aria-label="Can I get it?">
    <div class="card-head"><h2>${data.served ? "You can get it now" : data.available ? "It could be run, but nobody serves it" : "Nobody can run it right now"}</h2></div>
    <p>${sentenceOf(data, isHosted)}</p>
    ${data.served && html`<p class="apart"><a class="button" href=${addressOf("/playground", { model: name })}>Try it in the playground</a></p>`}
    ${data.served && html`<${Command} text=${curlOf("/v1/chat/completions", { model: name, messages: [{ role: "user", content: "Hello" }] })} what="the request" />`}
  </section>`;
}

function sentenceOf({ available, served, summary }, isHosted) {
  if (isHosted) return "It is served by its upstream, so it needs no node.";
  if (served) return "Requests to /v1 for it are routed to the nodes that serve it.";
  if (available) return "A healthy node has the hardware and the runtime, and neither declares the model nor reports it as loaded. Declare it on such a node, and load it there.";
  const reasons = Object.entries(summary).sort(([, one], [, other]) => other - one);
  if (reasons.length === 0) return "There is no node at all. Register one that fits.";
  return `Every node has a reason against it: ${reasons.map(([code, number]) => `${WORDS[code] ?? code} (${count(number)})`).join(", ")}. A node can have several.`;
}

// The nodes that name the model, those that have it loaded first, with what a request to each costs and how long it waits.
function ServedBy({ api, id, name, aliases }) {
  const found = usePolled((signal) => api.get("/compute", { model: id, perPage: PER_PAGE, sortBy: "load", sortOrder: "asc" }, signal), SECONDS, [api, id]);
  const names = new Set([name, id, ...aliases]);
  const isUp = ({ health }) => health.status === "healthy";
  const hasIt = (node) => node.health.availableModels.some((one) => names.has(one));
  const priceOf = ({ metadata }) => [...names].map((one) => metadata.prices?.[one]).find(Boolean)?.inputPer1kTokens ?? metadata.pricePer1kTokens ?? null;
  return html`<${Card} title="Who serves it" aside=${found.data && html`<span class="note">${pricesOf(found.data.nodes.map(priceOf))}</span>`}>
    <${Shown} of=${found} lines=${3}>${(data) => html`<${Table} caption="Nodes that name the model" className="serving" columns=${servingColumns(hasIt, priceOf)} rows=${[...data.nodes].sort((one, other) => isUp(other) - isUp(one) || hasIt(other) - hasIt(one))} keyOf=${(node) => node.id} empty=${html`<${Empty} title="None of your nodes declares it or reports it as loaded." />`} />`}</${Shown}>
  </${Card}>`;
}

const servingColumns = (hasIt, priceOf) => [
  ["Node", (node) => html`<a href=${addressOf(`/nodes/${node.id}`)}>${node.name}</a>`],
  ["Status", (node) => html`<${Status} status=${statusOf(node.health)} />`],
  ["Loaded", (node) => (hasIt(node) ? "yes" : "no")],
  ["1,000 tokens", (node) => (priceOf(node) === null ? "free" : dollars(priceOf(node))), "right"],
  ["Latency", (node) => milliseconds(node.health.avgLatencyMs), "right"],
  ["In flight", (node) => html`${count(node.health.inFlight)}${node.metadata.maxConcurrency ? html` <span class="note">of ${count(node.metadata.maxConcurrency)}</span>` : ""}`, "right"],
  ["Load", (node) => wholeShare(node.health.load), "right"],
];

function pricesOf(prices) {
  const known = prices.filter((price) => price !== null).map(Number).sort((one, other) => one - other);
  if (known.length === 0) return "";
  return known[0] === known.at(-1) ? `${dollars(known[0])} for 1,000 tokens` : `${dollars(known[0])} to ${dollars(known.at(-1))} for 1,000 tokens`;
}

function Nodes({ data, reason }) {
  const options = [["", "all"], ...Object.entries(data.summary).sort(([, one], [, other]) => other - one).map(([code, number]) => [code, `${WORDS[code] ?? code} (${count(number)})`])];
  if (reason && !(reason in data.summary)) options.push([reason, `${WORDS[reason]} (0)`]);
  return html`<${Card} title="Who could run it, and who can't" aside=${html`<span class="note">the nearest first; numbers count all nodes, the list holds yours</span>`}>
    <${Choice} label="Reason" options=${options} value=${reason} onChange=${(chosen) => changeQuery({ reason: chosen, page: "" })} />
    <${Table} caption="Why each node can or can't run it" className="explained" columns=${COLUMNS} rows=${data.nodes} keyOf=${(node) => node.passportId} empty=${html`<${Empty} title=${reason ? "No node of yours has this reason." : "You have no node. What stands above counts everybody's."} />`} />
    <${Pager} pagination=${data.pagination} noun="nodes" onPage=${(number) => changeQuery({ page: number }, {})} />
  </${Card}>`;
}

function Reason({ reason, id }) {
  return html`<li><span class="code">${reason.code}</span> ${inPlace(reason.message, id)}</li>`;
}

function History({ api, id, span }) {
  const metrics = usePolled((signal) => api.get("/compute/metrics", { ...span.asked, series: REQUEST_SERIES, model: id }, signal), span.seconds, [api, id, nameOf(span)]);
  return html`<${Card} title="Its requests over time" aside=${html`<${SpanChoice} span=${span} />`}>
    <${Shown} of=${metrics} lines=${5}>${(data) => html`<${RequestCharts} data=${data} sync="model" />`}</${Shown}>
  </${Card}>`;
}
