// Requests that run on a node now, and those that ended last.
import { count, dollars, milliseconds, moment } from "./format.js";
import { Fragment, html } from "./html.js";
import { Card, Empty, Shown, Table } from "./parts.js";
import { usePolled } from "./polling.js";
import { addressOf } from "./router.js";

const SECONDS = 3;
const LAST = 10;
const TONES = { completed: "good", failed: "bad", running: "info", lost: "warn", rejected: "warn" };

export function Jobs({ api, query }) {
  const about = [api, JSON.stringify(query)];
  const running = usePolled((signal) => api.get("/compute/jobs", { ...query, outcome: "running", perPage: 20 }, signal), SECONDS, about);
  const last = usePolled((signal) => api.get("/compute/jobs", { ...query, perPage: LAST }, signal), SECONDS * 2, about);
  return html`<${Fragment}>
    <${Card} title="Requests running now">
      <${Shown} of=${running} lines=${2}>${(data) => html`<${Table} caption="Requests running now" columns=${RUNNING} rows=${data.jobs} keyOf=${keyOf} empty=${html`<${Empty} title="No request has been running for more than 1 s." />`} />`}</${Shown}>
    </${Card}>
    <${Card} title="Last requests" aside=${html`<a href=${addressOf("/jobs", { node: query.passportId })}>All requests</a>`}>
      <${Shown} of=${last} lines=${3}>${(data) => html`<${Table} caption="Last requests" columns=${ENDED} rows=${data.jobs} keyOf=${keyOf} empty=${html`<${Empty} title="No request was sent to it yet." />`} />`}</${Shown}>
    </${Card}>
  </${Fragment}>`;
}

// How a job ended, and why.
export const outcomeOf = (job) => html`<span class=${`tone-${TONES[job.outcome] ?? "muted"}`}>${job.outcome}</span>${job.reason && html` <span class="note">${job.reason.replaceAll("_", " ")}</span>`}`;

const keyOf = (job) => `${job.id}/${job.attempt}`;
const RUNNING = [
  ["Began", (job) => moment(job.startedAt)],
  ["Model", (job) => job.model],
  ["Endpoint", (job) => job.endpoint],
  ["Streams", (job) => (job.stream ? "yes" : "no")],
];
const ENDED = [
  ["Began", (job) => html`<a href=${addressOf(`/jobs/${job.id}`)}>${moment(job.startedAt)}</a>`],
  ["Model", (job) => job.model],
  ["Outcome", (job) => outcomeOf(job)],
  ["Latency", (job) => milliseconds(job.latencyMs), "right"],
  ["First byte", (job) => milliseconds(job.firstByteMs), "right"],
  ["Tokens in", (job) => count(job.tokensIn), "right"],
  ["Tokens out", (job) => count(job.tokensOut), "right"],
  ["Price", (job) => dollars(job.priceUsd), "right"],
];
