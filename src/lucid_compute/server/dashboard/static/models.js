// The list of models: which can be run and reached right now.
import { count, gigabytes } from "./format.js";
import { Fragment, html } from "./html.js";
import { RegisterModel } from "./model_actions.js";
import { Chosen, Typed } from "./nodes.js";
import { Choice, Empty, Heading, Pager, Shown, Table, Verdict } from "./parts.js";
import { usePolled } from "./polling.js";
import { addressOf, changeQuery } from "./router.js";

const SECONDS = 5;
const PER_PAGE = 50;
const CHOICES = [["", "all"], ["true", "available"], ["false", "not available"]];
const ORDERS = [["-severity", "worst first"], ["severity", "best first"], ["-createdAt", "newest first"], ["createdAt", "oldest first"], ["name", "by name"], ["-name", "by name, backwards"]];
const COLUMNS = [
  ["Model", (model) => html`<a href=${addressOf(`/models/${encodeURIComponent(model.name)}`)}>${model.name}</a>`, "", "name"],
  ["Can be run", (model) => html`<${Verdict} holds=${model.available} yes="available" no="not available" />`, "", "severity"],
  ["Can be reached", (model) => html`<${Verdict} holds=${model.served} yes="served" no="not served" />`],
  ["Format", (model) => model.metadata.format],
  ["VRAM", (model) => vramOf(model.metadata.minVramGb), "right"],
  ["Context", (model) => count(model.metadata.contextLength), "right"],
  ["Owner", (model) => model.owner],
];

export function ModelsView({ api, query, mayRead }) {
  const page = Math.max(1, Number.parseInt(query.page ?? "1", 10) || 1);
  const sort = ORDERS.some(([name]) => name === query.sort) ? query.sort : ORDERS[0][0];
  const asked = { available: query.available ?? "", search: query.search ?? "", page, perPage: PER_PAGE, sortBy: sort.replace("-", ""), sortOrder: sort.startsWith("-") ? "desc" : "asc" };
  const models = usePolled((signal) => api.get("/models", asked, signal), SECONDS, [api, JSON.stringify(asked)]);
  return html`<${Fragment}>
    <${Heading} title="Models" aside=${mayRead && html`<a class="button primary" href=${addressOf("/models", { ...query, add: "model" })}>Register a model</a>`} />
    <form class="filters" role="search" aria-label="Filter models" onSubmit=${(event) => event.preventDefault()}>
      <${Typed} name="search" label="Name or id" value=${asked.search} />
      <${Chosen} name="sort" label="Order" value=${sort} options=${ORDERS} />
      <${Choice} label="Availability" options=${CHOICES} value=${asked.available} onChange=${(chosen) => changeQuery({ available: chosen, page: "" })} />
    </form>
    <section class="card" aria-label="Models found">
      <${Shown} of=${models} lines=${8}>${(data) => html`<${Fragment}>
        <${Table} caption="Models" columns=${COLUMNS} rows=${data.models} sort=${sort} onSort=${(chosen) => changeQuery({ sort: chosen, page: "" })} keyOf=${(model) => model.id} empty=${html`<${None} isFiltered=${Boolean(asked.available || asked.search)} />`} />
        <${Pager} pagination=${data.pagination} noun="models" onPage=${(number) => changeQuery({ page: number }, {})} />
      </${Fragment}>`}</${Shown}>
    </section>
    ${query.add === "model" && html`<${RegisterModel} api=${api} onClose=${() => changeQuery({ add: "" })} />`}
  </${Fragment}>`;
}

function None({ isFiltered }) {
  if (!isFiltered) return html`<${Empty} title="No model is registered yet."><a href=${addressOf("/models", { add: "model" })}>Register a model</a>, or <code>lucid passports create</code>.</${Empty}>`;
  return html`<${Empty} title="No model is like that."><button type="button" onClick=${() => changeQuery({ available: "", search: "", page: "" })}>Show all models</button></${Empty}>`;
}

export function vramOf(minimum) {
  if (minimum === null || minimum === undefined) return "–";
  if (typeof minimum !== "object") return gigabytes(minimum);
  return Object.entries(minimum).map(([name, size]) => `${name} ${gigabytes(size)}`).join(", ");
}
