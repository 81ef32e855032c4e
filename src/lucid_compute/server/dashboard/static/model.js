// A model: who serves it, and why can't others? By reason, nearest first.
import { curlOf } from "./api.js";
import { Command, Copy } from "./copying.js";
import { inPlace } from "./fixes.js";
import { nothingWithoutPayouts } from "./earned.js";
import { count, dollars, milliseconds, plural, wholeShare } from "./format.js";
import { Fragment, html } from "./html.js";
import { ModelActions } from "./model_actions.js";
import { vramOf } from "./models.js";
import { Card, Empty, Failure, Heading, Loading, Pager, Shown, SpanChoice, Status, statusOf, Table, Verdict } from "./parts.js";
import { usePolled } from "./polling.js";
import { REQUEST_SERIES, RequestCharts } from "./request_charts.js";
import { addressOf, changeQuery } from "./router.js";
import { nameOf, spanOf } from "./spans.js";

const SECONDS = 5;
const SLOW_SECONDS = 60;
const PER_PAGE = 50;
const NEAREST = 3;
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
  NOT_CONNECTED: "its agent is not connected",
};
const DEMAND_DAYS = 7;
const DAY_MS = 86_400_000;
const REFUSED = {
  nodes_busy: "all its nodes were busy",
  nodes_failing: "its nodes fail",
  no_healthy_node: "no node of it was healthy",
  no_node: "no node serves it",
  no_node_suits: "the request's own policy left no node",
  no_upstream: "its upstream failed",
};
const COLUMNS = [
  ["Node", (node) => html`<a href=${addressOf(`/nodes/${node.passportId}`)}>${node.name ?? node.passportId}</a>`],
  ["Why not, and what to do", (node) => html`<ul class="reasons">${node.reasons.map((reason) => html`<${Reason} reason=${reason} id=${node.passportId} key=${reason.code} />`)}</ul>`],
];

export function ModelView({ id, api, query, mayRead, mayRun }) {
  const at = encodeURIComponent(id);
  const model = usePolled((signal) => api.get(`/models/${at}`, {}, signal), SLOW_SECONDS, [api, id]);
  const why = usePolled((signal) => api.get(`/models/${at}/availability`, { page: 1, perPage: PER_PAGE }, signal), SECONDS, [api, id]);
  const crumbs = [["Models", "/models"]];
  if (model.data === undefined) {
    const name = model.error?.status === 404 ? "No such model" : "Model";
    return html`<${Fragment}><${Heading} title=${name} crumbs=${crumbs} />${model.error ? html`<${Failure} error=${model.error} />` : html`<${Loading} lines=${6} />`}</${Fragment}>`;
  }
  const { metadata, name, owner } = model.data;
  const facts = [metadata.format, metadata.minVramGb ? `${vramOf(metadata.minVramGb)} VRAM` : "", metadata.contextLength ? `${count(metadata.contextLength)} tokens of context` : "", (metadata.runtimes ?? []).join(", "), `owner ${owner}`];
  const hasNodes = metadata.format !== "api";
  return html`<${Fragment}>
    <${Heading} title=${name} crumbs=${crumbs} />
    <p class="lead">${facts.filter(Boolean).join(" · ")} <span class="id">${model.data.id}<${Copy} text=${model.data.id} what="the id" /></span></p>
    ${mayRead && html`<${ModelActions} api=${api} model=${model.data} asked=${query.do} key=${query.do} />`}
    <${Shown} of=${why} lines=${5}>${(data) => html`<${Fragment}>
      <${Answer} data=${data} name=${name} isHosted=${!hasNodes} />
      ${data.route?.length > 0 && html`<${Route} route=${data.route} id=${model.data.id} />`}
      ${mayRun && html`<${Waiting} api=${api} id=${model.data.id} />`}
      ${hasNodes && mayRead && html`<${ServedBy} api=${api} id=${model.data.id} name=${name} aliases=${metadata.aliases ?? []} why=${data} />`}
      ${hasNodes && html`<${WhoCannot} api=${api} at=${at} data=${data} query=${query} />`}
    </${Fragment}>`}</${Shown}>
    ${mayRead && html`<${UnmetDemand} api=${api} id=${model.data.id} />`}
    ${mayRead && html`<${History} api=${api} id=${model.data.id} span=${spanOf(query)} />`}
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

// Where requests for it go: to one of several models by weight, and to the others when none of the first can be served.
function Route({ route, id }) {
  return html`<${Card} title="Where its requests go" aside=${html`<span class="note">by weight, then the fallbacks in their order</span>`}>
    <${Table} caption="Models of the route" columns=${ROUTE} rows=${route.map((each) => ({ ...each, isItself: each.modelPassportId === id }))} keyOf=${(each) => each.modelPassportId} />
  </${Card}>`;
}

const ROUTE = [
  ["Model", (each) => html`<a href=${addressOf(`/models/${encodeURIComponent(each.model)}`)}>${each.model}</a>${each.isItself ? html` <span class="note">itself</span>` : ""}`],
  ["Gets", (each) => (each.weight === null ? (each.isItself ? "what the others can't" : "fallback") : `weight ${count(each.weight)}`)],
  ["Can be reached", (each) => html`<${Verdict} holds=${each.served} yes="served" no="not served" />`],
];

// Requests that wait because its nodes are busy. Nothing is shown where the service has no queue, or none waits.
function Waiting({ api, id }) {
  const match = usePolled((signal) => api.change("POST", "/match", { model: id }, { signal }), SECONDS, [api, id]);
  const waiting = match.data?.waiting ?? 0;
  return waiting > 0 && html`<p class="card tone-warn" role="status">${plural(waiting, "request")} ${waiting === 1 ? "waits" : "wait"} for a node of it that is not busy, in the queue of one worker.</p>`;
}

// Requests for it that no node got: what more nodes, or better ones, would earn.
function UnmetDemand({ api, id }) {
  const day = (offset) => new Date(Date.now() + offset * DAY_MS).toISOString().slice(0, 10);
  const losses = usePolled((signal) => api.get("/payouts/losses", { from: day(1 - DEMAND_DAYS), to: day(1), model: id }, signal).catch(nothingWithoutPayouts), SLOW_SECONDS, [api, id]);
  const refused = (losses.data?.losses ?? []).filter((loss) => loss.refused > 0).sort((one, other) => other.refused - one.refused);
  if (losses.data === null) return null;
  return html`<${Card} title="Unmet demand" aside=${html`<span class="note">requests for it that no node got, last ${DEMAND_DAYS} days, in UTC</span>`}>
    <${Shown} of=${losses} lines=${2}>${() => html`<${Table} caption="Requests that were refused, by cause" columns=${DEMAND} rows=${refused} keyOf=${(loss) => loss.cause} empty=${html`<${Empty} title="No request for it was refused." />`} />`}</${Shown}>
  </${Card}>`;
}

const DEMAND = [
  ["Cause", (loss) => REFUSED[loss.cause] ?? loss.cause.replaceAll("_", " ")],
  ["Requests", (loss) => count(loss.refused), "right"],
  ["Not earned", (loss) => dollars(loss.unearnedUsd), "right"],
];

// The nodes that name the model, those that have it loaded first, with what a request to each costs and how long it
// waits; and nodes that could run it, which neither declare it nor report it.
function ServedBy({ api, id, name, aliases, why }) {
  const found = usePolled((signal) => api.get("/compute", { model: id, perPage: PER_PAGE, sortBy: "load", sortOrder: "asc" }, signal), SECONDS, [api, id]);
  const names = new Set([name, id, ...aliases]);
  const isUp = ({ health }) => health.status === "healthy";
  const hasIt = (node) => node.health.availableModels.some((one) => names.has(one));
  const priceOf = ({ metadata }) => [...names].map((one) => metadata.prices?.[one]).find(Boolean)?.inputPer1kTokens ?? metadata.pricePer1kTokens ?? null;
  const serving = new Set(found.data?.nodes.map((node) => node.id));
  const others = found.data ? why.nodes.filter(({ eligible, passportId }) => eligible && !serving.has(passportId)) : [];
  return html`<${Card} title="Who serves it" aside=${found.data && html`<span class="note">${pricesOf(found.data.nodes.map(priceOf))}</span>`}>
    <${Shown} of=${found} lines=${3}>${(data) => html`<${Table} caption="Nodes that name the model" className="serving" columns=${servingColumns(hasIt, priceOf)} rows=${[...data.nodes].sort((one, other) => isUp(other) - isUp(one) || hasIt(other) - hasIt(one))} keyOf=${(node) => node.id} empty=${html`<${Empty} title="None of your nodes declares it or reports it as loaded." />`} />`}</${Shown}>
    ${others.length > 0 && html`<h3 class="apart">Who could and doesn't</h3>
      <p class="note">They have the hardware and the runtime. Declare the model on one, and load it there.</p>
      <ul class="chips could">${others.map(({ passportId, name: called }) => html`<li class="chip" key=${passportId}><a href=${addressOf(`/nodes/${passportId}`)}>${called ?? passportId}</a></li>`)}</ul>`}
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

// Those who can't, by reason. One group is open at a time and stands in the address; without one, the nearest are shown.
function WhoCannot({ api, at, data, query }) {
  const reason = query.reason in WORDS ? query.reason : "";
  const groups = Object.entries(data.summary).sort(([, one], [, other]) => other - one);
  if (reason && !(reason in data.summary)) groups.push([reason, 0]);
  const nearest = data.nodes.filter(({ eligible }) => !eligible).slice(0, NEAREST);
  if (groups.length === 0) return null;
  return html`<${Card} title="Who can't, by reason" aside=${html`<span class="note">numbers count all nodes, lists hold yours</span>`}>
    ${!reason && nearest.length > 0 && html`<${Fragment}><h3>The nearest</h3><${Explained} caption="The nodes that lack least" nodes=${nearest} /></${Fragment}>`}
    ${!reason && nearest.length === 0 && html`<p class="note">None of these nodes is yours.</p>`}
    <ul class="groups">${groups.map(([code, number]) => html`<li key=${code}>
      <button type="button" class="group" aria-expanded=${code === reason} onClick=${() => changeQuery({ reason: code === reason ? "" : code, page: "" })}><span aria-hidden="true">${code === reason ? "▾" : "▸"}</span> <span>${WORDS[code] ?? code}</span> <strong>${count(number)}</strong></button>
      ${code === reason && html`<${Group} api=${api} at=${at} reason=${code} page=${Math.max(1, Number.parseInt(query.page ?? "1", 10) || 1)} />`}
    </li>`)}</ul>
  </${Card}>`;
}

// The nodes that have a reason, those that lack least first.
function Group({ api, at, reason, page }) {
  const found = usePolled((signal) => api.get(`/models/${at}/availability`, { reason, page, perPage: PER_PAGE }, signal), SECONDS, [api, at, reason, page]);
  return html`<${Shown} of=${found} lines=${3}>${(data) => html`<${Fragment}>
    <${Explained} caption=${`Nodes with this reason: ${WORDS[reason] ?? reason}`} nodes=${data.nodes} />
    <${Pager} pagination=${data.pagination} noun="nodes" onPage=${(number) => changeQuery({ page: number }, {})} />
  </${Fragment}>`}</${Shown}>`;
}

function Explained({ caption, nodes }) {
  return html`<${Table} caption=${caption} className="explained" columns=${COLUMNS} rows=${nodes} keyOf=${(node) => node.passportId} empty=${html`<${Empty} title="No node of yours has this reason." />`} />`;
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
