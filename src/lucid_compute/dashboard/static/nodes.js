// The list of nodes, page by page as the service has them, with filters that stand in the address.
import { ago, count, gigabytes, milliseconds, share, wholeShare } from "./format.js";
import { Fragment, html, useEffect, useRef, useState } from "./html.js";
import { Empty, Heading, Pager, Shown, Status, Table } from "./parts.js";
import { usePolled } from "./polling.js";
import { addressOf, changeQuery } from "./router.js";

const SECONDS = 5;
const PER_PAGE = 50;
const TYPING_MS = 250;
const FILTERS = ["search", "status", "region", "gpu", "model", "owner"];
const STATUSES = ["healthy", "unhealthy", "draining", "deregistered"];
const ORDERS = [["newest first", "createdAt", "desc"], ["oldest first", "createdAt", "asc"], ["by name", "name", "asc"]];

export function NodesView({ api, query, owner }) {
  const filters = Object.fromEntries(FILTERS.map((name) => [name, query[name] ?? ""]));
  const page = Math.max(1, Number.parseInt(query.page ?? "1", 10) || 1);
  const [, sortBy, sortOrder] = ORDERS.find(([name]) => name === query.order) ?? ORDERS[0];
  const asked = { ...filters, page, perPage: PER_PAGE, sortBy, sortOrder };
  const nodes = usePolled((signal) => api.get("/compute", asked, signal), SECONDS, [api, JSON.stringify(asked)]);
  const isFiltered = FILTERS.some((name) => filters[name]);
  return html`<${Fragment}>
    <${Heading} title="Nodes" />
    <${Filters} filters=${filters} order=${query.order ?? ""} isAdmin=${owner === null} />
    <section class="card" aria-label="Nodes found">
      <${Shown} of=${nodes} lines=${8}>${(data) => html`<${Fragment}>
        <${Table} caption="Nodes" columns=${columnsOf(owner === null)} rows=${data.nodes} keyOf=${(node) => node.id} empty=${html`<${None} isFiltered=${isFiltered} isPastEnd=${data.pagination.total > 0} />`} />
        <${Pager} pagination=${data.pagination} noun="nodes" onPage=${(number) => changeQuery({ page: number }, {})} />
      </${Fragment}>`}</${Shown}>
    </section>
  </${Fragment}>`;
}

function columnsOf(isAdmin) {
  return [
    ["Node", (node) => html`<a href=${addressOf(`/nodes/${node.id}`)}>${node.name}</a>`],
    ["Status", (node) => html`<${Status} status=${node.health.status} />`],
    ["GPU", (node) => html`${node.metadata.gpu ?? "–"} <span class="note">${gigabytes(node.metadata.vramGb)}</span>`],
    ["Region", (node) => node.metadata.region ?? "–"],
    ...(isAdmin ? [["Owner", (node) => node.owner]] : []),
    ["Load", (node) => wholeShare(node.health.load), "right"],
    ["In flight", (node) => count(node.health.inFlight), "right"],
    ["Queue", (node) => count(node.health.queueDepth), "right"],
    ["Latency", (node) => milliseconds(node.health.avgLatencyMs), "right"],
    ["Errors", (node) => share(node.health.errorRate), "right"],
    ["Heartbeat", (node) => (node.health.heartbeatAgeSeconds === null ? "never" : ago(node.health.heartbeatAgeSeconds)), "right"],
  ];
}

function None({ isFiltered, isPastEnd }) {
  if (isPastEnd) return html`<${Empty} title="The list ends before this page."><button type="button" onClick=${() => changeQuery({ page: "" })}>Go to its first page</button></${Empty}>`;
  if (isFiltered) return html`<${Empty} title="No node is like that."><button type="button" onClick=${() => changeQuery(Object.fromEntries([...FILTERS, "page"].map((name) => [name, ""])))}>Show all nodes</button></${Empty}>`;
  return html`<${Empty} title="No node is registered yet.">Run <code>lucid agent run</code> beside an inference server; it appears here with its first heartbeat.</${Empty}>`;
}

function Filters({ filters, order, isAdmin }) {
  return html`<form class="filters" role="search" aria-label="Filter nodes" onSubmit=${(event) => event.preventDefault()}>
    <${Typed} name="search" label="Name" value=${filters.search} />
    <div class="field"><label for="filter-status">Status</label><select id="filter-status" value=${filters.status} onChange=${(event) => changeQuery({ status: event.currentTarget.value, page: "" })}>
      <option value="">any but ended</option>${STATUSES.map((status) => html`<option value=${status} key=${status}>${status}</option>`)}
    </select></div>
    <${Typed} name="gpu" label="GPU" value=${filters.gpu} />
    <${Typed} name="region" label="Region" value=${filters.region} />
    <${Typed} name="model" label="Model" value=${filters.model} />
    ${isAdmin && html`<${Typed} name="owner" label="Owner" value=${filters.owner} />`}
    <div class="field"><label for="filter-order">Order</label><select id="filter-order" value=${order || ORDERS[0][0]} onChange=${(event) => changeQuery({ order: event.currentTarget.value, page: "" })}>
      ${ORDERS.map(([name]) => html`<option value=${name} key=${name}>${name}</option>`)}
    </select></div>
  </form>`;
}

// A field that filters a moment after the last key was struck.
export function Typed({ name, label, value }) {
  const [text, setText] = useState(value);
  const timer = useRef(0);
  useEffect(() => setText(value), [value]);
  const type = (event) => {
    const entered = event.currentTarget.value;
    setText(entered);
    clearTimeout(timer.current);
    timer.current = setTimeout(() => changeQuery({ [name]: entered.trim(), page: "" }), TYPING_MS);
  };
  return html`<div class="field"><label for=${`filter-${name}`}>${label}</label><input id=${`filter-${name}`} type="search" value=${text} onInput=${type} autocomplete="off" /></div>`;
}
