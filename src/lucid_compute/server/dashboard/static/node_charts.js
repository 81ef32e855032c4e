// What a node did over time, with its events in line.
import { Chart } from "./chart.js";
import { eventWord, signOf, toneOf } from "./chart_overlays.js";
import { useProviderShare } from "./earned.js";
import { count, gigabytes, moment, wholeShare } from "./format.js";
import { Fragment, html } from "./html.js";
import { Empty, Shown } from "./parts.js";
import { usePolled } from "./polling.js";
import { REQUEST_SERIES, RequestCharts } from "./request_charts.js";
import { addressOf } from "./router.js";
import { nameOf } from "./spans.js";

const SERIES = `${REQUEST_SERIES},load,gpuUtilization,gpuMemoryUsedMb,gpuMemoryTotalMb,queueDepth,inFlight,failures`;
const MAX_EVENTS = 100;

export function NodeCharts({ api, at, span }) {
  const metrics = usePolled((signal) => api.get(`/compute/metrics/${at}`, { ...span.asked, series: SERIES }, signal), span.seconds, [api, at, nameOf(span)]);
  const events = usePolled((signal) => api.get(`/compute/events/${at}`, { since: span.since, perPage: MAX_EVENTS }, signal), span.seconds, [api, at, nameOf(span)]);
  const share = useProviderShare(api);
  return html`<${Shown} of=${metrics} lines=${8}>${(data) => html`<${Fragment}>
    <${Charts} data=${data} share=${share} events=${events.data?.events ?? []} />
    <div class="pair"><${Events} events=${events} outages=${data.outages} at=${at} /><${Failures} totals=${data.failureTotals} /></div>
  </${Fragment}>`}</${Shown}>`;
}

function Charts({ data, share, events }) {
  const { series } = data;
  return html`<${RequestCharts} data=${data} share=${share} sync="node" events=${events}>${(one) => html`
    <${Chart} ...${one} title="GPU and load" write=${wholeShare} axis=${wholeShare} lines=${[["GPU busy", series.gpuUtilization], ["load", series.load]]} />
    <${Chart} ...${one} title="GPU memory" write=${gigabytes} axis=${gigabytes} lines=${[["used", inGigabytes(series.gpuMemoryUsedMb)], ["total", inGigabytes(series.gpuMemoryTotalMb)]]} />
    <${Chart} ...${one} title="Queue and in flight" unit="requests" isWhole=${true} lines=${[["in flight", series.inFlight], ["queue", series.queueDepth]]} />
  `}</${RequestCharts}>`;
}

const inGigabytes = (values) => values.map((value) => (value === null ? null : value / 1024));

function Events({ events, outages, at }) {
  return html`<section aria-label="Events"><h3>What happened <a class="note" href=${addressOf("/events", { node: at, span: "30d" })}>All events</a></h3>
    <${Shown} of=${events} lines=${3}>${(data) => {
      const lines = inOrder(data.events, outages);
      if (lines.length === 0) return html`<${Empty} title="Nothing happened in this span." />`;
      return html`<ol class="events" tabindex="0" aria-label="What happened, newest first">${lines.map((line) => html`<li key=${line.key}><time datetime=${line.at}>${moment(line.at)}</time> <span class=${`mark mark-${line.tone}`} aria-hidden="true">${signOf(line.tone)}</span> <span>${line.text}${line.reason && html` <span class="note">${line.reason}</span>`}</span></li>`)}</ol>`;
    }}</${Shown}>
  </section>`;
}

function inOrder(events, outages) {
  const ofNode = events.map((event) => ({ key: event.id, at: event.at, tone: toneOf(event.type), text: eventWord(event.type), reason: event.reason }));
  const ofOurs = outages.map((outage) => ({ key: outage.startedAt, at: outage.startedAt, tone: "ours", text: "An outage of the registry, ours", reason: "it counts against no node" }));
  return [...ofNode, ...ofOurs].sort((one, other) => (one.at < other.at ? 1 : -1));
}

function Failures({ totals }) {
  const reasons = Object.entries(totals ?? {}).sort(([, one], [, other]) => other - one);
  return html`<section aria-label="Failures"><h3>Failures by reason</h3>
    ${reasons.length === 0 ? html`<${Empty} title="No request failed on the node." />` : html`<table class="plain"><caption class="hidden">Failures by reason</caption>
      <thead><tr><th scope="col">Reason</th><th scope="col" class="right">Requests</th></tr></thead>
      <tbody>${reasons.map(([reason, number]) => html`<tr key=${reason}><th scope="row">${reason.replaceAll("_", " ")}</th><td class="right">${count(number)}</td></tr>`)}</tbody>
    </table>`}
  </section>`;
}
