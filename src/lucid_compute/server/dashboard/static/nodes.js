// The list of nodes, page by page as the service has them, with filters that stand in the address.
import { BulkActions } from "./bulk_actions.js";
import { count, gigabytes, milliseconds, share, wholeShare } from "./format.js";
import { Fragment, html, useEffect, useRef, useState } from "./html.js";
import { Empty, Heading, Pager, Shown, Status, statusOf, Table } from "./parts.js";
import { usePolled } from "./polling.js";
import { addressOf, changeQuery } from "./router.js";
import { Ago } from "./ticking.js";

const SECONDS = 5;
const PER_PAGE = 50;
const TYPING_MS = 250;
const FILTERS = ["search", "status", "region", "gpu", "model", "owner"];
const STATUSES = [["", "all except deregistered"], ...["healthy", "unhealthy", "draining", "deregistered"].map((status) => [status, status])];
// What the address says of the order: the API's name of it, with a minus before it for the highest first.
const ORDERS = [
  ["-severity", "worst first"], ["severity", "best first"], ["-createdAt", "newest first"], ["createdAt", "oldest first"], ["name", "by name"], ["-name", "by name, backwards"], ["-load", "most load first"], ["load", "least load first"],
  ["-queueDepth", "longest queue first"], ["queueDepth", "shortest queue first"], ["-inFlight", "most in flight first"], ["inFlight", "fewest in flight first"],
  ["-heartbeatAt", "heard last first"], ["heartbeatAt", "longest unheard first"],
];
const isKnown = new Set(ORDERS.map(([name]) => name));

export function NodesView({ api, query, owner }) {
  const filters = Object.fromEntries(FILTERS.map((name) => [name, query[name] ?? ""]));
  const page = Math.max(1, Number.parseInt(query.page ?? "1", 10) || 1);
  const sort = isKnown.has(query.sort) ? query.sort : ORDERS[0][0];
  const asked = { ...filters, page, perPage: PER_PAGE, sortBy: sort.replace("-", ""), sortOrder: sort.startsWith("-") ? "desc" : "asc" };
  const nodes = usePolled((signal) => api.get("/compute", asked, signal), SECONDS, [api, JSON.stringify(asked)]);
  const [selected, setSelected] = useState([]); // by id: what is on another page stays selected
  const toggle = (node) => setSelected((former) => (former.some(({ id }) => id === node.id) ? former.filter(({ id }) => id !== node.id) : [...former, node]));
  const asShown = (node) => nodes.data?.nodes.find(({ id }) => id === node.id) ?? node; // with what is in flight now
  const isFiltered = FILTERS.some((name) => filters[name]);
  return html`<${Fragment}>
    <${Heading} title="Nodes" aside=${html`<a class="button primary" href=${addressOf("/nodes", { ...query, add: "node" })}>Add a node</a>`} />
    <${Filters} filters=${filters} sort=${sort} isAdmin=${owner === null} nodes=${nodes.data?.nodes ?? []} />
    <section class="card" aria-label="Nodes found">
      ${selected.length > 0 && html`<${BulkActions} api=${api} nodes=${selected.map(asShown)} onEnd=${() => setSelected([])} />`}
      <${Shown} of=${nodes} lines=${8}>${(data) => html`<${Fragment}>
        <${Table} caption="Nodes" className="nodes" columns=${columnsOf(owner === null)} rows=${data.nodes} keyOf=${(node) => node.id} isSelected=${(node) => selected.some(({ id }) => id === node.id)} onSelect=${toggle} sort=${sort} onSort=${sortBy} empty=${html`<${None} isFiltered=${isFiltered} isPastEnd=${data.pagination.total > 0} />`} />
        <${Pager} pagination=${data.pagination} noun="nodes" onPage=${(number) => changeQuery({ page: number }, {})} />
      </${Fragment}>`}</${Shown}>
    </section>
  </${Fragment}>`;
}

function sortBy(sort) {
  changeQuery({ sort: sort === ORDERS[0][0] ? "" : sort, page: "" });
}

function columnsOf(isAdmin) {
  return [
    ["Node", (node) => html`<a href=${addressOf(`/nodes/${node.id}`)}>${node.name}</a>`, "", "name"],
    ["Status", (node) => html`<${Status} status=${statusOf(node.health)} />`, "long", "severity"],
    ["Models", (node) => html`<${ModelNames} names=${node.health.availableModels} />`, "wide-only"],
    ["GPU", (node) => html`${node.metadata.gpu ?? "–"} <span class="note">${gigabytes(node.metadata.vramGb)}</span>`, "long"],
    ["Region", (node) => node.metadata.region ?? "–"],
    ...(isAdmin ? [["Owner", (node) => node.owner]] : []),
    ["Load", (node) => wholeShare(node.health.load), "right", "load"],
    ["In flight", (node) => count(node.health.inFlight), "right", "inFlight"],
    ["Queue", (node) => count(node.health.queueDepth), "right", "queueDepth"],
    ["Latency", (node) => milliseconds(node.health.avgLatencyMs), "right"],
    ["Errors", (node) => share(node.health.errorRate), "right"],
    ["Heartbeat", (node) => html`<${Ago} seconds=${node.health.heartbeatAgeSeconds} of=${node} />`, "right long", "heartbeatAt"],
  ];
}

const SOME = 2; // models that are named

function ModelNames({ names }) {
  if (names.length === 0) return html`<span class="note">none loaded</span>`;
  return html`<span title=${names.join(", ")}>${names.slice(0, SOME).join(", ")}${names.length > SOME && html` <span class="note">and ${count(names.length - SOME)} more</span>`}</span>`;
}

function None({ isFiltered, isPastEnd }) {
  if (isPastEnd) return html`<${Empty} title="The list ends before this page."><button type="button" onClick=${() => changeQuery({ page: "" })}>Go to its first page</button></${Empty}>`;
  if (isFiltered) return html`<${Empty} title="No node is like that."><button type="button" onClick=${() => changeQuery(Object.fromEntries([...FILTERS, "page"].map((name) => [name, ""])))}>Show all nodes</button></${Empty}>`;
  return html`<${Empty} title="No node is registered yet."><a href=${addressOf("/nodes", { add: "node" })}>Add a node</a>: one command beside an inference server.</${Empty}>`;
}

// What is suggested is what the nodes on the page have.
function Filters({ filters, sort, isAdmin, nodes }) {
  const known = (valueOf) => [...new Set(nodes.flatMap(valueOf).filter(Boolean))].sort();
  return html`<form class="filters" role="search" aria-label="Filter nodes" onSubmit=${(event) => event.preventDefault()}>
    <${Typed} name="search" label="Name or id" value=${filters.search} />
    <${Chosen} name="status" label="Status" value=${filters.status} options=${STATUSES} />
    <${Typed} name="gpu" label="GPU" value=${filters.gpu} known=${known((node) => node.metadata.gpu)} />
    <${Typed} name="region" label="Region" value=${filters.region} known=${known((node) => node.metadata.region)} />
    <${Typed} name="model" label="Model" value=${filters.model} known=${known((node) => node.health.availableModels)} />
    ${isAdmin && html`<${Typed} name="owner" label="Owner" value=${filters.owner} known=${known((node) => node.owner)} />`}
    <div class="field"><label for="filter-order">Order</label><select id="filter-order" value=${sort} onChange=${(event) => sortBy(event.currentTarget.value)}>
      ${ORDERS.map(([name, text]) => html`<option value=${name} key=${name}>${text}</option>`)}
    </select></div>
  </form>`;
}

// One of a few, as a filter.
export function Chosen({ name, label, value, options }) {
  return html`<div class="field"><label for=${`filter-${name}`}>${label}</label><select id=${`filter-${name}`} value=${value} onChange=${(event) => changeQuery({ [name]: event.currentTarget.value, page: "" })}>
    ${options.map(([each, text]) => html`<option value=${each} key=${each}>${text}</option>`)}
  </select></div>`;
}

// A field that filters a moment after the last key was struck. `known` is suggested.
export function Typed({ name, label, value, known = [] }) {
  const [text, setText] = useState(value);
  const timer = useRef(0);
  useEffect(() => setText(value), [value]);
  const type = (event) => {
    const entered = event.currentTarget.value;
    setText(entered);
    clearTimeout(timer.current);
    timer.current = setTimeout(() => changeQuery({ [name]: entered.trim(), page: "" }), TYPING_MS);
  };
  return html`<div class="field"><label for=${`filter-${name}`}>${label}</label><input id=${`filter-${name}`} type="search" list=${known.length > 0 ? `known-${name}` : undefined} value=${text} onInput=${type} autocomplete="off" />
    ${known.length > 0 && html`<datalist id=${`known-${name}`}>${known.map((each) => html`<option value=${each} key=${each}></option>`)}</datalist>`}</div>`;
}
