// A node: how it is, what to fix, what it did over time, and what runs on it now.
import { useAction } from "./acting.js";
import { curlOf } from "./api.js";
import { NodeCharts } from "./node_charts.js";
import { Copy } from "./copying.js";
import { Fixes } from "./fixes.js";
import { count, duration, gigabytes, megabytes, milliseconds, share, shareMark, shortMoment, uptimeShare, wholeShare } from "./format.js";
import { Fragment, html } from "./html.js";
import { Jobs } from "./jobs.js";
import { NextRequest, NodeFacts } from "./node_about.js";
import { NodeActions } from "./node_actions.js";
import { Card, Empty, Failure, Figure, Figures, Heading, Loading, Shown, SpanChoice, Status, statusOf } from "./parts.js";
import { usePolled } from "./polling.js";
import { spanOf } from "./spans.js";
import { Ago, Lasting } from "./ticking.js";

const HEALTH_SECONDS = 3;
const DECLARATION_SECONDS = 10;
const SLOW_SECONDS = 60;
const MUCH_ERROR = 0.05;
const ENDED = "NODE_DEREGISTERED";

export function NodeView({ id, api, query }) {
  const at = encodeURIComponent(id);
  const passport = usePolled((signal) => api.get(`/passports/${at}`, {}, signal), SLOW_SECONDS, [api, id]);
  const health = usePolled((signal) => nothingOfEnded(api.get(`/compute/health/${at}`, {}, signal), { isEnded: true, status: "deregistered" }), HEALTH_SECONDS, [api, id]);
  const declaration = usePolled((signal) => nothingOfEnded(api.get(`/compute/models/${at}`, {}, signal), { models: [] }), DECLARATION_SECONDS, [api, id]);
  const routing = usePolled((signal) => nothingOfEnded(api.get(`/compute/routing/${at}`, {}, signal), { models: [] }), DECLARATION_SECONDS, [api, id]);
  const probing = useProbe(api, at);
  const crumbs = [["Nodes", "/nodes"]];
  if (passport.data === undefined) {
    const name = passport.error?.status === 404 ? "No such node" : "Node";
    return html`<${Fragment}><${Heading} title=${name} crumbs=${crumbs} />${passport.error ? html`<${Failure} error=${passport.error} />` : html`<${Loading} lines=${6} />`}</${Fragment}>`;
  }
  const node = passport.data;
  const span = spanOf(query);
  return html`<${Fragment}>
    <${Heading} title=${node.name} crumbs=${crumbs} aside=${health.data && html`<${Status} status=${statusOf(health.data)} />`} />
    <p class="lead">${[node.metadata.gpu, gigabytes(node.metadata.vramGb), node.metadata.region, `owner ${node.owner}`].filter(Boolean).join(" · ")} <span class="id">${node.id}<${Copy} text=${node.id} what="the id" /></span>
      <span class="id">curl<${Copy} text=${curlOf(`/compute/health/${node.id}`)} what="this as a curl command" /></span></p>
    ${health.data && !health.data.isEnded && html`<${NodeActions} api=${api} node=${node} health=${health.data} declaration=${declaration.data} onProbe=${probing.start} asked=${query.do} key=${query.do} />`}
    <${Shown} of=${health} lines=${4}>${(data) => (data.isEnded ? html`<${Ended} />` : html`<${Now} node=${node} health=${data} />`)}</${Shown}>
    ${health.data && !health.data.isEnded && html`<${NextRequest} api=${api} node=${node} health=${health.data} routing=${routing} />`}
    ${health.data && !health.data.isEnded && html`<${NodeFacts} api=${api} node=${node} health=${health.data} declaration=${declaration} probing=${probing} routing=${routing} />`}
    <${Uptime} api=${api} at=${at} />
    <${Card} title="Over time" aside=${html`<${SpanChoice} span=${span} />`}>
      <${NodeCharts} api=${api} at=${at} span=${span} />
    </${Card}>
    <${Jobs} api=${api} query=${{ passportId: id }} />
  </${Fragment}>`;
}

// Return what is asked of a node, and `instead` of one that has ended.
async function nothingOfEnded(asked, instead) {
  try {
    return await asked;
  } catch (error) {
    if (error.code === ENDED) return instead;
    throw error;
  }
}

// A probe on request; the tab remembers what the last one found.
function useProbe(api, at) {
  const name = `lucid.probe.${at}`;
  const probing = useAction(async () => {
    const found = await api.change("POST", `/compute/probe/${at}`);
    remember(name, found);
    return found;
  });
  return { ...probing, result: probing.result ?? recall(name) };
}

function remember(name, value) {
  try {
    sessionStorage.setItem(name, JSON.stringify(value));
  } catch {
    // Storage may be switched off or full: then it is known until the page is left.
  }
}

function recall(name) {
  try {
    return JSON.parse(sessionStorage.getItem(name));
  } catch {
    return null;
  }
}

function Ended() {
  return html`<${Card} title="This node has ended"><p>It was deregistered or revoked, for good. What it did stays readable below; its name can be registered again.</p></${Card}>`;
}

function Now({ node, health }) {
  const gpus = health.reported?.gpus ?? [];
  return html`<${Fragment}>
    <${Fixes} node=${node} health=${health} />
    <${Card} title="Now">
      <${Figures} label="Now">
        <${Figure} label="in flight" value=${count(health.inFlight)} note=${node.metadata.maxConcurrency ? `of ${count(node.metadata.maxConcurrency)}` : ""} />
        <${Figure} label="load" value=${wholeShare(health.load)} />
        <${Figure} label="queue" value=${count(health.queueDepth)} />
        <${Figure} label="latency, last hour" value=${milliseconds(health.avgLatencyMs)} />
        <${Figure} label="errors, last hour" value=${share(health.errorRate)} tone=${health.errorRate > MUCH_ERROR ? "bad" : ""} />
        <${Figure} label="jobs completed" value=${count(health.jobsCompleted)} />
        <${Figure} label="heartbeat" value=${html`<${Ago} seconds=${health.heartbeatAgeSeconds} of=${health} />`} tone=${health.fresh ? "" : "warn"} />
        <${Figure} label="up for" value=${html`<${Lasting} seconds=${health.uptimeSeconds} of=${health} />`} />
      </${Figures}>
      ${gpus.length > 0 && html`<div class="gpus">${gpus.map((gpu) => html`<${Gpu} gpu=${gpu} key=${gpu.index} />`)}</div>`}
      <p class="chips"><span class="note">Models loaded</span> ${health.availableModels.length ? health.availableModels.map((model) => html`<span class="chip" key=${model}>${model}</span>`) : html`<span class="note">none reported</span>`}</p>
    </${Card}>
  </${Fragment}>`;
}

function Gpu({ gpu }) {
  const used = gpu.memoryTotalMb ? gpu.memoryUsedMb / gpu.memoryTotalMb : null;
  return html`<div class="gpu">
    <strong>GPU ${gpu.index}</strong> <span class="note">${gpu.name ?? ""}</span>
    <${Meter} label="busy" value=${gpu.utilization} text=${wholeShare(gpu.utilization)} />
    <${Meter} label="memory" value=${used} text=${used === null ? "–" : `${megabytes(gpu.memoryUsedMb)} of ${megabytes(gpu.memoryTotalMb)}`} />
    <span class="note">${[gpu.temperatureC === null ? "" : `${count(gpu.temperatureC)} °C`, gpu.powerW === null ? "" : `${count(gpu.powerW)} W`].filter(Boolean).join(" · ")}</span>
  </div>`;
}

function Meter({ label, value, text }) {
  return html`<div class="meter"><span>${label}</span><meter min="0" max="1" value=${value ?? 0} aria-label=${`${label}: ${text}`}></meter><span>${text}</span></div>`;
}

function Uptime({ api, at }) {
  const uptime = usePolled((signal) => api.get(`/compute/uptime/${at}`, {}, signal), SLOW_SECONDS, [api, at]);
  return html`<${Card} title="Uptime" aside=${uptime.data && html`<span class="note">target ${shareMark(uptime.data.target)}</span>`}>
    <${Shown} of=${uptime} lines=${2}>${({ windows, target }) => windows.every((window_) => window_.uptime === null) ? html`<${Empty} title="Nothing is known yet. It begins with the first heartbeat." />` : html`<${Figures} label="Uptime">
      ${windows.map((window_) => html`<${Figure} key=${window_.days} label=${window_.days === 1 ? "1 day" : `${window_.days} days`} value=${hasVerdict(window_) ? uptimeShare(window_.uptime) : "–"}
        tone=${hasVerdict(window_) && window_.uptime < target ? "bad" : ""} note=${html`<${Budget} of=${window_} />`} />`)}
    </${Figures}>`}</${Shown}>
  </${Card}>`;
}

// Whether so much is known that a share of it says something: an hour.
const hasVerdict = ({ uptime, errorBudget }) => uptime !== null && errorBudget !== null;
const knownSeconds = ({ healthySeconds, unhealthySeconds, drainingSeconds, registryOutageSeconds }) => healthySeconds + unhealthySeconds + drainingSeconds + registryOutageSeconds;

function Budget({ of: window_ }) {
  const { days, errorBudget, registryOutageSeconds } = window_;
  const left = errorBudget?.remaining ?? null;
  const known = knownSeconds(window_);
  const isSpent = left !== null && errorBudget.usedSeconds > errorBudget.allowedSeconds;
  const text = left === null ? "" : isSpent ? "error budget overspent" : `${wholeShare(left)} of the error budget left`;
  return html`<${Fragment}>
    ${known > 0 && known < days * 86_400 - 60 && html`<span>since ${shortMoment(Date.now() - known * 1000, known)} (${duration(known)})</span>`}
    ${left !== null && html`<span class="budget"><meter min="0" max="1" low="0.25" high="0.5" optimum="1" value=${Math.max(left, 0)} aria-label=${text}></meter></span>`}
    <span>${text}</span>
    ${registryOutageSeconds > 0 && html`<span>${duration(registryOutageSeconds)} left out: outages of ours</span>`}
  </${Fragment}>`;
}
