// The audit trail: every change, who made it, to what, when and from where. For admins.
import { detailsOf } from "./events.js";
import { moment, UNKNOWN } from "./format.js";
import { Fragment, html } from "./html.js";
import { Chosen, Typed } from "./nodes.js";
import { Card, Empty, Heading, Pager, Shown, Table } from "./parts.js";
import { usePolled } from "./polling.js";
import { addressOf, changeQuery } from "./router.js";

const SECONDS = 10;
const PER_PAGE = 50;
const GROUPS = [["", "all"], ["compute", "of nodes"], ["passport", "of passports"], ["key", "of keys"]];
const COLUMNS = [
  ["At", (event) => moment(event.at)],
  ["Action", (event) => event.action.replaceAll("_", " ")],
  ["Of", (event) => html`${event.targetType} ${event.targetType === "passport" || event.targetType === "node" ? html`<a class="id" href=${addressOf(`/nodes/${event.targetId}`)}>${event.targetId}</a>` : html`<span class="id">${event.targetId}</span>`}`],
  ["By", (event) => html`${event.actorOwner ?? "the service"}${event.actorKeyId && html` <span class="note">key ${event.actorKeyId.slice(0, 8)}</span>`}`],
  ["From", (event) => event.ip ?? UNKNOWN],
  ["Details", (event) => detailsOf(event.details)],
];

export function AuditView({ api, query }) {
  const page = Math.max(1, Number.parseInt(query.page ?? "1", 10) || 1);
  const asked = { targetId: query.target ?? "", action: query.action ?? "", actor: query.by ?? "", page, perPage: PER_PAGE };
  const events = usePolled((signal) => api.get("/audit", asked, signal), SECONDS, [api, JSON.stringify(asked)]);
  return html`<${Fragment}>
    <${Heading} title="Audit" />
    <form class="filters" role="search" aria-label="Filter changes" onSubmit=${(event) => event.preventDefault()}>
      <${Typed} name="target" label="Id of a node, model or key" value=${asked.targetId} />
      <${Chosen} name="action" label="Changes" value=${asked.action} options=${GROUPS} />
      <${Typed} name="by" label="By an owner, or a key's id" value=${asked.actor} />
    </form>
    <${Card} label="Changes found">
      <${Shown} of=${events} lines=${8}>${(data) => html`<${Fragment}>
        <${Table} caption="Changes" columns=${COLUMNS} rows=${data.events} keyOf=${(event) => event.id} empty=${html`<${Empty} title=${asked.targetId || asked.action || asked.actor ? "No change is like that." : "Nothing was changed."} />`} />
        <${Pager} pagination=${data.pagination} noun="changes" onPage=${(number) => changeQuery({ page: number }, {})} />
      </${Fragment}>`}</${Shown}>
    </${Card}>
  </${Fragment}>`;
}
