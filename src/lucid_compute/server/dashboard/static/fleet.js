// The fleet at a glance.
import { Chart } from "./chart.js";
import { count, duration, milliseconds, moment, plural, share, wholeShare } from "./format.js";
import { Fragment, html } from "./html.js";
import { vramOf } from "./models.js";
import { Card, Empty, Figure, Figures, Heading, Shown, SpanChoice, Status, statusOf } from "./parts.js";
import { usePolled } from "./polling.js";
import { REQUEST_SERIES, RequestCharts, stepUnit } from "./request_charts.js";
import { EarnedFigure, MostEarned, useProviderShare } from "./earned.js";
import { ROOT, addressOf } from "./router.js";
import { nameOf, spanOf } from "./spans.js";

const LIST_SECONDS = 10;
const LISTED = 5;
const SERIES = `${REQUEST_SERIES},nodesHealthy,nodesUnhealthy,nodesDraining,gpuUtilization,failures`;

export function FleetView({ api, query, overview }) {
  const isEmpty = overview.data && overview.data.nodes.total === 0 && overview.data.models.total === 0;
  return html`<${Fragment}>
    <${Heading} title="Fleet" />
    <${Shown} of=${overview} lines=${4}>${(data) => (isEmpty ? html`<${FirstSteps} />` : html`<${Glance} api=${api} data=${data} />`)}</${Shown}>
    ${overview.data && !isEmpty && html`<${Attention} api=${api} overview=${overview.data} />`}
    ${!isEmpty && html`<${History} api=${api} span=${spanOf(query)} />`}
    ${overview.data && !isEmpty && html`<${MostEarned} api=${api} />`}
    ${overview.data && html`<${Outages} data=${overview.data} />`}
  </${Fragment}>`;
}

function Glance({ api, data }) {
  const { nodes, models, lastHour } = data;
  const unavailable = models.total - models.available;
  const hour = lastHour ?? {};
  return html`<div class="glance">
    <${Card} title="Nodes" aside=${html`<a href=${addressOf("/nodes")}>All nodes</a>`}>
      <${Shares} nodes=${nodes} />
      <${Figures} label="Nodes by state">
        <${Figure} label="healthy" value=${count(nodes.healthy)} tone="good" href=${addressOf("/nodes", { status: "healthy" })} />
        <${Figure} label="unhealthy" value=${count(nodes.unhealthy)} tone=${nodes.unhealthy ? "bad" : ""} href=${addressOf("/nodes", { status: "unhealthy" })} />
        <${Figure} label="draining" value=${count(nodes.draining)} tone=${nodes.draining ? "warn" : ""} href=${addressOf("/nodes", { status: "draining" })} />
      </${Figures}>
    </${Card}>
    <${Card} title="Models" aside=${html`<a href=${addressOf("/models")}>All models</a>`}>
      <${Bar} label=${`${models.available} of ${models.total} models available`} parts=${[["good", models.available], ["bad", unavailable]]} />
      <${Figures} label="Models">
        <${Figure} label="available" value=${count(models.available)} tone="good" href=${addressOf("/models", { available: "true" })} />
        <${Figure} label="not available" value=${count(unavailable)} tone=${unavailable ? "bad" : ""} href=${addressOf("/models", { available: "false" })} />
        <${Figure} label="served" value=${count(models.served)} />
      </${Figures}>
    </${Card}>
    <${Card} title="Last hour" className="wide" aside=${html`<span class="note">${plural(data.inFlight, "request")} in flight</span>`}>
      ${lastHour === null && html`<p class="note">The records can't be read at the moment.</p>`}
      <${Figures} label="The last hour">
        <${Figure} label="requests" value=${count(hour.requests)} />
        <${Figure} label="errors" value=${share(hour.errorRate)} note=${hour.failed ? html`<a href=${addressOf("/jobs", { outcome: "failed", span: "1h" })}>${count(hour.failed)} failed</a>` : ""} tone=${hour.errorRate > 0.01 ? "bad" : ""} />
        <${Figure} label="latency p50" value=${milliseconds(hour.latencyP50Ms)} note=${hour.latencyP95Ms == null ? "" : `p95 ${milliseconds(hour.latencyP95Ms)}`} />
        <${Figure} label="tokens out" value=${count(hour.tokensOut)} note=${hour.tokensIn == null ? "" : `${count(hour.tokensIn)} in`} />
        <${EarnedFigure} api=${api} charged=${hour.revenueUsd} />
      </${Figures}>
    </${Card}>
  </div>`;
}

function Shares({ nodes }) {
  const label = `${nodes.healthy} healthy, ${nodes.unhealthy} unhealthy and ${nodes.draining} draining of ${nodes.total} nodes`;
  return html`<${Bar} label=${label} parts=${[["good", nodes.healthy], ["warn", nodes.draining], ["bad", nodes.unhealthy]]} />`;
}

function Bar({ label, parts }) {
  return html`<div class="bar" role="img" aria-label=${label}>${parts.map(([tone, size]) => size > 0 && html`<span class=${`bar-${tone}`} key=${tone} style=${{ flexGrow: size }}></span>`)}</div>`;
}

function FirstSteps() {
  return html`<${Card} title="Nothing is registered yet">
    <p>Beside a running inference server, one command registers it as a node, declares its models and keeps it alive. The page makes the key, shows the command, and tells when the first request can be sent.</p>
    <p><a class="button primary" href=${addressOf("/", { add: "node" })}>Add a node</a></p>
    <p class="note"><a href=${`${ROOT}/docs`}>The API</a> does the same by hand: <code>POST /passports</code>, then <code>POST /compute/heartbeat</code>.</p>
  </${Card}>`;
}

// What to look at first: nodes that are unhealthy and models that nobody can get.
function Attention({ api, overview }) {
  const sick = usePolled((signal) => api.get("/compute", { status: "unhealthy", perPage: LISTED, sortBy: "severity" }, signal), LIST_SECONDS, [api, overview.nodes.unhealthy]);
  const missing = usePolled((signal) => api.get("/models", { available: "false", perPage: LISTED }, signal), LIST_SECONDS, [api, overview.models.available, overview.models.total]);
  return html`<div class="pair">
    <${Card} title="Nodes to look after" aside=${overview.nodes.unhealthy > LISTED && html`<a href=${addressOf("/nodes", { status: "unhealthy" })}>All ${count(overview.nodes.unhealthy)}</a>`}>
      <${Shown} of=${sick} lines=${3}>${(data) => data.nodes.length === 0 ? html`<${Empty} title="Every node is well." />` : html`<ul class="list">${data.nodes.map((node) => html`<li key=${node.id}>
        <a href=${addressOf(`/nodes/${node.id}`)}>${node.name}</a> <${Status} status=${statusOf(node.health)} />
        <span class="note">${node.health.reasons[0]?.message ?? ""}</span>
      </li>`)}</ul>`}</${Shown}>
    </${Card}>
    <${Card} title="Models nobody can get" aside=${overview.models.total - overview.models.available > LISTED && html`<a href=${addressOf("/models", { available: "false" })}>All ${count(overview.models.total - overview.models.available)}</a>`}>
      <${Shown} of=${missing} lines=${3}>${(data) => data.models.length === 0 ? html`<${Empty} title="Every model can be run." />` : html`<ul class="list">${data.models.map((model) => html`<li key=${model.id}>
        <a href=${addressOf(`/models/${encodeURIComponent(model.name)}`)}>${model.name}</a>
        <span class="note">needs ${needsOf(model.metadata)}</span>
      </li>`)}</ul>`}</${Shown}>
    </${Card}>
  </div>`;
}

function needsOf({ minVramGb, runtimes = [], contextLength }) {
  const needs = [minVramGb ? `${vramOf(minVramGb)} of VRAM` : "", runtimes.join(" or "), contextLength ? `${count(contextLength)} tokens of context` : ""];
  return needs.filter(Boolean).join(", ") || "a node that is up";
}

function History({ api, span }) {
  const share = useProviderShare(api);
  const metrics = usePolled((signal) => api.get("/compute/metrics", { ...span.asked, series: SERIES }, signal), span.seconds, [api, nameOf(span)]);
  return html`<${Card} title="Over time" aside=${html`<${SpanChoice} span=${span} />`}>
    <${Shown} of=${metrics} lines=${6}>${(data) => html`<${RequestCharts} data=${data} share=${share} sync="fleet">${(one) => html`
      <${Chart} ...${one} title="Nodes by state" isWhole=${true} write=${count} axis=${count} lines=${[["healthy", data.series.nodesHealthy, { colour: "good" }], ["draining", data.series.nodesDraining, { colour: "warn" }], ["unhealthy", data.series.nodesUnhealthy, { colour: "bad" }]]} />
      <${Chart} ...${one} title="GPUs busy" unit="mean of all nodes" write=${wholeShare} axis=${wholeShare} lines=${[["busy", data.series.gpuUtilization]]} />
      <${Chart} ...${one} title="Failures by reason" unit=${stepUnit(data.times)} isWhole=${true} write=${count} axis=${count} empty="No request failed in this span." lines=${failureLines(data)} />
    `}</${RequestCharts}>`}</${Shown}>
  </${Card}>`;
}

// The three reasons that were most are drawn; all of them stand in the numbers.
function failureLines({ failures, failureTotals }) {
  const reasons = Object.keys(failures ?? {}).sort((one, other) => failureTotals[other] - failureTotals[one]);
  return reasons.map((reason, place) => [reason.replaceAll("_", " "), failures[reason], { tableOnly: place > 2 }]);
}

function Outages({ data }) {
  const { outages, outageSince } = data;
  if (outages.length === 0 && !outageSince) return null;
  return html`<${Card} title="Outages of the registry itself">
    <p class="note">These are ours. They count against no node: they are left out of every uptime, and no node became unhealthy by them.</p>
    <ul class="list">
      ${outageSince && html`<li><strong>Now</strong>, since ${moment(outageSince)}</li>`}
      ${outages.slice(0, 10).map((outage) => html`<li key=${outage.startedAt}>${moment(outage.startedAt)} <span class="note">for ${duration((Date.parse(outage.endedAt) - Date.parse(outage.startedAt)) / 1000)}</span></li>`)}
    </ul>
  </${Card}>`;
}
