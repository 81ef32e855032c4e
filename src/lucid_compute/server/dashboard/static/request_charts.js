// The charts of requests: of the fleet, of a node, of a model. Each adds charts of its own.
import { Chart } from "./chart.js";
import { earnedOf } from "./earned.js";
import { count, dollars, milliseconds, millisecondsMark, plural, share, shareMark, short, zone } from "./format.js";
import { Fragment, html } from "./html.js";
import { eventWord, signOf, toneOf } from "./chart_overlays.js";
import { zoom } from "./spans.js";

export const REQUEST_SERIES = "requests,failed,requestsPerSecond,errorRate,latencyP50Ms,latencyP95Ms,latencyP99Ms,tokensIn,tokensOut,tokensOutPerSecond,revenueUsd";

// With `share`, the providers' part of what was charged is what is shown first.
export function RequestCharts({ data, sync, events = [], share: providerShare = null, children }) {
  const { times, series, totals, outages } = data;
  const one = { times, outages, events, sync, onZoom: zoom };
  const step = stepUnit(times);
  return html`<${Fragment}>
    <p class="note">${plural(totals.requests ?? 0, "request")}, ${count(totals.failed)} failed, ${count(totals.tokensOut)} tokens out, ${moneyOf(totals.revenueUsd, providerShare)} in this span. Times are in ${zone()}${outages.length > 0 ? "; grey is an outage of the registry itself" : ""}.</p>
    ${events.length > 0 && html`<${MarksLegend} events=${events} />`}
    <div class="charts">
      <${Chart} ...${one} title="Requests a second" lines=${[["requests", series.requestsPerSecond], ["ended", series.requests, { tableOnly: true, write: count }]]} />
      <${Chart} ...${one} title="Latency" write=${milliseconds} axis=${millisecondsMark} lines=${[["p50", series.latencyP50Ms], ["p95", series.latencyP95Ms], ["p99", series.latencyP99Ms]]} />
      <${Chart} ...${one} title="Errors" write=${share} axis=${shareMark} lines=${[["error rate", series.errorRate], ["failed", series.failed, { tableOnly: true, write: count }]]} />
      <${Chart} ...${one} title="Tokens out a second" axis=${short} lines=${[["tokens", series.tokensOutPerSecond], ["out", series.tokensOut, { tableOnly: true, write: count }]]} />
      ${children?.(one)}
      ${providerShare === null
        ? html`<${Chart} ...${one} title="Charged" unit=${step} write=${dollars} axis=${dollars} lines=${[["US dollars", series.revenueUsd]]} />`
        : html`<${Chart} ...${one} title="Earned" unit=${step} write=${dollars} axis=${dollars} lines=${[["US dollars", series.revenueUsd.map((charged) => earnedOf(charged, providerShare))], ["charged", series.revenueUsd, { tableOnly: true }]]} />`}
    </div>
  </${Fragment}>`;
}

// What the marks over the charts are.
function MarksLegend({ events }) {
  const types = [...new Set(events.map((event) => event.type))];
  return html`<ul class="legend" aria-label="Marks over the charts">${types.map((type) => html`<li key=${type}><span class=${`mark mark-${toneOf(type)}`} aria-hidden="true">${signOf(toneOf(type))}</span>${eventWord(type)}</li>`)}</ul>`;
}

// What a sum over each step is of.
export function stepUnit(times) {
  const seconds = times.length > 1 ? (Date.parse(times[1]) - Date.parse(times[0])) / 1000 : 60;
  return { 60: "a minute", 300: "in 5 minutes", 3600: "an hour", 86400: "a day" }[seconds] ?? `in ${seconds} s`;
}

const moneyOf = (charged, share) => (share === null ? `${dollars(charged)} charged` : `${dollars(earnedOf(charged, share))} earned of ${dollars(charged)} charged`);
