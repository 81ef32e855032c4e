// All requests, with every filter of the API, and one request's whole story: each of its attempts.
import { count, dollars, milliseconds, moment, UNKNOWN } from "./format.js";
import { Fragment, html } from "./html.js";
import { outcomeOf } from "./jobs.js";
import { Chosen, Typed } from "./nodes.js";
import { Card, Empty, Heading, Pager, Shown, SpanChoice, Table } from "./parts.js";
import { usePolled } from "./polling.js";
import { addressOf, changeQuery } from "./router.js";
import { nameOf, spanOf } from "./spans.js";

const SECONDS = 5;
const PER_PAGE = 50;
const AROUND_MS = 15_000; // an id has the instant at which it was made; clocks and attempts differ by so much
const MOST_PAGES = 5;
const OUTCOMES = [["", "all"], ...["running", "completed", "failed", "rejected", "cancelled", "lost"].map((outcome) => [outcome, outcome])];
const ORDERS = [["", "newest first"], ["asc", "oldest first"]];

export function JobsView({ api, query, isAdmin }) {
  const page = Math.max(1, Number.parseInt(query.page ?? "1", 10) || 1);
  const span = spanOf(query, "24h");
  const filters = { passportId: query.node ?? "", model: query.model ?? "", outcome: query.outcome ?? "", owner: query.owner ?? "", consumer: query.consumer ?? "", sortOrder: query.order === "asc" ? "asc" : "" };
  const asked = { ...filters, page, perPage: PER_PAGE };
  const jobs = usePolled((signal) => api.get("/compute/jobs", { ...asked, since: spanOf(query, "24h").since, until: span.asked.to }, signal), SECONDS, [api, JSON.stringify(asked), nameOf(span)]);
  return html`<${Fragment}>
    <${Heading} title="Jobs" />
    <form class="filters" role="search" aria-label="Filter jobs" onSubmit=${(event) => event.preventDefault()}>
      <${Typed} name="model" label="Model" value=${query.model ?? ""} />
      <${Typed} name="node" label="Node's id" value=${query.node ?? ""} />
      <${Chosen} name="outcome" label="Outcome" value=${query.outcome ?? ""} options=${OUTCOMES} />
      ${isAdmin && html`<${Typed} name="owner" label="Owner of the node" value=${query.owner ?? ""} />`}
      ${isAdmin && html`<${Typed} name="consumer" label="Sent by" value=${query.consumer ?? ""} />`}
      <${Chosen} name="order" label="Order" value=${query.order ?? ""} options=${ORDERS} />
      <${SpanChoice} span=${span} />
    </form>
    <${Card} label="Jobs found">
      <${Shown} of=${jobs} lines=${8}>${(data) => html`<${Fragment}>
        <${Table} caption="Jobs" columns=${columnsOf(isAdmin)} rows=${data.jobs} keyOf=${(job) => `${job.id}/${job.attempt}`} empty=${html`<${Empty} title="No request is like that in this span." />`} />
        <${Pager} pagination=${data.pagination} noun="jobs" onPage=${(number) => changeQuery({ page: number }, {})} />
      </${Fragment}>`}</${Shown}>
    </${Card}>
  </${Fragment}>`;
}

const columnsOf = (isAdmin) => [
  ["Began", (job) => html`<a href=${addressOf(`/jobs/${job.id}`)}>${moment(job.startedAt)}</a>`],
  ["Model", (job) => html`<a href=${addressOf(`/models/${job.modelId}`)}>${job.model}</a>`],
  ["Outcome", (job) => outcomeOf(job)],
  ["Node", nodeLink],
  ...(isAdmin ? [["From", (job) => job.consumer ?? UNKNOWN]] : []),
  ["Latency", (job) => milliseconds(job.latencyMs), "right"],
  ["First byte", (job) => milliseconds(job.firstByteMs), "right"],
  ["Tokens in", (job) => count(job.tokensIn), "right"],
  ["Tokens out", (job) => count(job.tokensOut), "right"],
  ["Price", (job) => dollars(job.priceUsd), "right"],
];

function nodeLink(job) {
  return job.passportId ? html`<a href=${addressOf(`/nodes/${job.passportId}`)}>${job.passportId.slice(0, 8)}</a>` : "its upstream";
}

export function JobView({ api, id }) {
  const found = usePolled((signal) => attemptsOf(api, id, signal), SECONDS, [api, id]);
  return html`<${Fragment}>
    <${Heading} title="A request" crumbs=${[["Jobs", "/jobs"]]} />
    <p class="lead"><code>${id}</code></p>
    <${Shown} of=${found} lines=${4}>${(attempts) => (attempts.length === 0
      ? html`<${Card} title="No such job"><p>None of yours has this id: it was mistyped, is another owner's, is older than jobs are kept, or was refused before a node was chosen.</p></${Card}>`
      : html`<${Story} attempts=${attempts} />`)}</${Shown}>
  </${Fragment}>`;
}

function Story({ attempts }) {
  const last = attempts.at(-1);
  const facts = [["Model", html`<a href=${addressOf(`/models/${last.modelId}`)}>${last.model}</a>`], ["Endpoint", last.endpoint], ["Streamed", last.stream ? "yes" : "no"], ["From", last.consumer], ["Key", last.keyId]];
  return html`<${Fragment}>
    <${Card} title="What was asked"><dl class="facts">${facts.filter(([, value]) => value).map(([label, value]) => html`<div key=${label}><dt>${label}</dt><dd>${value}</dd></div>`)}</dl></${Card}>
    <${Card} title=${attempts.length === 1 ? "Its attempt" : "Its attempts"}><${Table} caption="Attempts" columns=${ATTEMPTS} rows=${attempts} keyOf=${(job) => job.attempt} /></${Card}>
  </${Fragment}>`;
}

const ATTEMPTS = [
  ["Attempt", (job) => count(job.attempt)],
  ["Began", (job) => moment(job.startedAt)],
  ["Node", nodeLink],
  ["Outcome", (job) => outcomeOf(job)],
  ["Status", (job) => job.status ?? UNKNOWN],
  ["First byte", (job) => milliseconds(job.firstByteMs), "right"],
  ["Latency", (job) => milliseconds(job.latencyMs), "right"],
  ["Tokens", (job) => html`${count(job.tokensIn)} in, ${count(job.tokensOut)} out${job.tokensCounted ? html` <span class="note">counted here</span>` : ""}`, "right"],
  ["Price", (job) => dollars(job.priceUsd), "right"],
];

// Return the attempts of a request, the first one first. The API lists jobs by time, and the id has the time.
async function attemptsOf(api, id, signal) {
  const madeAt = Number.parseInt(id.replaceAll("-", "").slice(0, 12), 16);
  if (!/^[0-9a-f-]{36}$/i.test(id) || !(madeAt < 8.64e15)) return [];
  const instant = (offset) => new Date(madeAt + offset).toISOString();
  const found = [];
  for (let page = 1; page <= MOST_PAGES; page += 1) {
    const { jobs, pagination } = await api.get("/compute/jobs", { since: instant(-AROUND_MS), until: instant(AROUND_MS * 4), sortOrder: "asc", page, perPage: 100 }, signal);
    found.push(...jobs.filter((job) => job.id === id));
    if (page >= pagination.totalPages) break;
  }
  return found.sort((one, other) => one.attempt - other.attempt);
}
