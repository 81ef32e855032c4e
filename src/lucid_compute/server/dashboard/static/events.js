// What happened to all nodes: when, to which, why. Filters stand in the address.
import { EVENT_TYPES, eventWord, signOf, toneOf } from "./chart_overlays.js";
import { moment, UNKNOWN } from "./format.js";
import { Fragment, html } from "./html.js";
import { Chosen, Typed } from "./nodes.js";
import { Card, Empty, Heading, Pager, Shown, SpanChoice, Table } from "./parts.js";
import { usePolled } from "./polling.js";
import { addressOf, changeQuery } from "./router.js";
import { nameOf, spanOf } from "./spans.js";

const SECONDS = 5;
const PER_PAGE = 50;
const TYPES = [["", "all"], ...EVENT_TYPES.map((type) => [type, eventWord(type)])];

export function EventsView({ api, query, isAdmin }) {
  const page = Math.max(1, Number.parseInt(query.page ?? "1", 10) || 1);
  const span = spanOf(query, "24h");
  const asked = { passportId: query.node ?? "", type: query.type ?? "", owner: query.owner ?? "", page, perPage: PER_PAGE };
  const events = usePolled((signal) => api.get("/compute/events", { ...asked, since: spanOf(query, "24h").since, until: span.asked.to }, signal), SECONDS, [api, JSON.stringify(asked), nameOf(span)]);
  return html`<${Fragment}>
    <${Heading} title="Events" />
    <form class="filters" role="search" aria-label="Filter events" onSubmit=${(event) => event.preventDefault()}>
      <${Chosen} name="type" label="Event" value=${asked.type} options=${TYPES} />
      <${Typed} name="node" label="Node's id" value=${asked.passportId} />
      ${isAdmin && html`<${Typed} name="owner" label="Owner" value=${asked.owner} />`}
      <${SpanChoice} span=${span} />
    </form>
    <${Card} label="Events found">
      <${Shown} of=${events} lines=${8}>${(data) => html`<${Fragment}>
        <${Table} caption="Events" columns=${columnsOf(isAdmin)} rows=${data.events} keyOf=${(event) => event.id} empty=${html`<${Empty} title="Nothing like that happened in this span." />`} />
        <${Pager} pagination=${data.pagination} noun="events" onPage=${(number) => changeQuery({ page: number }, {})} />
      </${Fragment}>`}</${Shown}>
    </${Card}>
  </${Fragment}>`;
}

const columnsOf = (isAdmin) => [
  ["At", (event) => moment(event.at)],
  ["Event", (event) => html`<span class=${`mark mark-${toneOf(event.type)}`} aria-hidden="true">${signOf(toneOf(event.type))}</span> ${eventWord(event.type)}`],
  ["Node", (event) => html`<a href=${addressOf(`/nodes/${event.passportId}`)}>${event.name}</a>`],
  ...(isAdmin ? [["Owner", (event) => event.owner]] : []),
  ["Why", (event) => event.reason ?? UNKNOWN],
  ["Details", (event) => detailsOf(event.details)],
];

// Return the details of an event or a change as one line.
export function detailsOf(details) {
  const entries = Object.entries(details ?? {});
  return entries.length === 0 ? UNKNOWN : entries.map(([name, value]) => `${name}: ${typeof value === "object" ? JSON.stringify(value) : value}`).join(", ");
}
