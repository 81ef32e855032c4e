// What an owner's keys have used and what it cost, by day, model and key; and how much of their budgets is spent.
import { Chart } from "./chart.js";
import { SaveCsv } from "./copying.js";
import { count, dollars, exactDollars as exact, moment, share, UNKNOWN } from "./format.js";
import { Fragment, html, useState } from "./html.js";
import { Chosen, Typed } from "./nodes.js";
import { Card, Choice, Empty, Figure, Figures, Heading, Pager, Shown, Table } from "./parts.js";
import { usePolled } from "./polling.js";
import { addressOf, changeQuery } from "./router.js";

const SECONDS = 15;
const PER_PAGE = 50;
const DAY_MS = 86_400_000;
const MUCH_ERROR = 0.01;
const SPANS = [["", "this month"], ["last", "last month"], ["-7d", "7 days"], ["-30d", "30 days"], ["-90d", "90 days"]];
const GROUPS = [["day", "day"], ["model", "model"], ["key", "key"]];

export function UsageView({ api, query, isAdmin }) {
  const by = [...GROUPS, ["owner", "owner"]].some(([name]) => name === query.by) ? query.by : "day";
  const asked = { ...daysOf(query.span ?? ""), model: query.model ?? "", keyId: query.key ?? "", owner: query.owner ?? "" };
  const about = JSON.stringify(asked);
  const report = usePolled((signal) => api.get("/usage", { ...asked, groupBy: by }, signal), SECONDS, [api, about, by]);
  const days = usePolled((signal) => api.get("/usage", { ...asked, groupBy: "day" }, signal), SECONDS, [api, about]);
  return html`<${Fragment}>
    <${Heading} title="Usage" />
    <form class="filters" role="search" aria-label="Filter usage" onSubmit=${(event) => event.preventDefault()}>
      <${Chosen} name="span" label="Days, in UTC" value=${query.span ?? ""} options=${SPANS} />
      <${Typed} name="model" label="Model" value=${asked.model} />
      <${Typed} name="key" label="Key's id" value=${asked.keyId} />
      ${isAdmin && html`<${Typed} name="owner" label="Owner" value=${asked.owner} />`}
    </form>
    <${Shown} of=${days} lines=${5}>${(data) => html`<${Spent} data=${data} />`}</${Shown}>
    <${Card} title="What was used" aside=${html`<span class="buttons"><${Choice} label="By" options=${isAdmin ? [...GROUPS, ["owner", "owner"]] : GROUPS} value=${by} onChange=${(chosen) => changeQuery({ by: chosen === "day" ? "" : chosen })} /><${SaveCsv} api=${api} path="/usage" asked=${{ ...asked, groupBy: by }} name=${`usage-${by}`} /></span>`}>
      <${Shown} of=${report} lines=${5}>${(data) => html`<${Lines} lines=${data.usage} by=${by} key=${about + by} />`}</${Shown}>
    </${Card}>
    <${Shown} of=${days} lines=${2}>${({ budgets }) => html`<${Budgets} budgets=${budgets} isAdmin=${isAdmin} />`}</${Shown}>
  </${Fragment}>`;
}

// Return what the API is asked for: nothing is this month until now.
function daysOf(span) {
  if (span !== "last") return { from: SPANS.some(([name]) => name === span) ? span : "" };
  const now = new Date();
  const first = (offset) => new Date(Date.UTC(now.getUTCFullYear(), now.getUTCMonth() + offset, 1)).toISOString().slice(0, 10);
  return { from: first(-1), to: first(0) };
}

function Spent({ data }) {
  const { total, usage, from, to } = data;
  const byDay = new Map(usage.map((line) => [line.day, line]));
  const days = Array.from({ length: Math.round((Date.parse(to) - Date.parse(from)) / DAY_MS) }, (_, day) => new Date(Date.parse(from) + day * DAY_MS).toISOString().slice(0, 10));
  const times = days.map((day) => `${day}T00:00:00Z`);
  const valuesOf = (name) => days.map((day) => byDay.get(day)?.[name] ?? 0);
  const errors = total.requests ? total.errors / total.requests : 0;
  return html`<${Card} title="Spent" aside=${html`<span class="note">${from} until before ${to}, in UTC</span>`}>
    <${Figures} label="Spent in these days">
      <${Figure} label="spent" value=${dollars(total.priceUsd)} title=${exact(total.priceUsd)} />
      <${Figure} label="requests" value=${count(total.requests)} note=${total.cancelled ? `${count(total.cancelled)} cancelled` : ""} />
      <${Figure} label="errors" value=${share(errors)} note=${total.errors ? count(total.errors) : ""} tone=${errors > MUCH_ERROR ? "bad" : ""} />
      <${Figure} label="tokens in" value=${count(total.tokensIn)} />
      <${Figure} label="tokens out" value=${count(total.tokensOut)} />
    </${Figures}>
    <div class="charts">
      <${Chart} title="Spent" unit="a day" sync="usage" times=${times} write=${dollars} axis=${dollars} lines=${[["US dollars", valuesOf("priceUsd")]]} />
      <${Chart} title="Requests" unit="a day" sync="usage" times=${times} isWhole=${true} write=${count} axis=${count} lines=${[["requests", valuesOf("requests")], ["errors", valuesOf("errors"), { colour: "bad" }]]} />
      <${Chart} title="Tokens" unit="a day" sync="usage" times=${times} isWhole=${true} write=${count} axis=${count} lines=${[["in", valuesOf("tokensIn")], ["out", valuesOf("tokensOut")]]} />
    </div>
  </${Card}>`;
}

// Each group has its page of the same: a model, a key or an owner alone. A name is missing when nothing has it any more.
const HEADS = {
  day: ["Day", (line) => line.day],
  model: ["Model", (line) => html`<a href=${addressOf(`/models/${line.modelId}`)}>${line.model ?? line.modelId}</a>`],
  key: ["Key", (line) => html`<a href=${addressOf("/usage", { key: line.keyId })}>${line.key ?? line.keyId}</a>`],
  owner: ["Owner", (line) => html`<a href=${addressOf("/usage", { owner: line.owner })}>${line.owner}</a>`],
};
const COLUMNS = [
  ["Requests", (line) => count(line.requests), "right"],
  ["Errors", (line) => count(line.errors), "right"],
  ["Cancelled", (line) => count(line.cancelled), "right"],
  ["Tokens in", (line) => count(line.tokensIn), "right"],
  ["Tokens out", (line) => count(line.tokensOut), "right"],
  ["US dollars", (line) => exact(line.priceUsd), "right"],
];

// Days are listed newest first, all else by what it cost.
function Lines({ lines, by }) {
  const [page, setPage] = useState(1);
  const sorted = by === "day" ? lines.toReversed() : lines.toSorted((one, other) => other.priceUsd - one.priceUsd || other.requests - one.requests);
  const totalPages = Math.ceil(sorted.length / PER_PAGE);
  return html`<${Fragment}>
    <${Table} caption=${`Usage by ${by}`} columns=${[HEADS[by], ...COLUMNS]} rows=${sorted.slice((page - 1) * PER_PAGE, page * PER_PAGE)} keyOf=${(line) => line.day ?? line.modelId ?? line.keyId ?? line.owner} empty=${html`<${Empty} title="Nothing was used in these days." />`} />
    <${Pager} pagination=${{ total: sorted.length, page, perPage: PER_PAGE, totalPages }} noun="lines" onPage=${setPage} />
  </${Fragment}>`;
}

function Budgets({ budgets, isAdmin }) {
  const text = budgets === null ? html`<${Empty} title="Name an owner to see the budgets of its keys.">${isAdmin && html`<a href=${addressOf("/usage", { by: "owner" })}>Usage by owner</a>`}</${Empty}>` : html`<${Empty} title="No key has a budget.">An admin sets one when the key is made.</${Empty}>`;
  return html`<${Card} title="Budgets"><${Table} caption="Budgets of keys" columns=${BUDGETS} rows=${budgets ?? []} keyOf=${(budget) => budget.keyId} empty=${text} /></${Card}>`;
}

const BUDGETS = [
  ["Key", (budget) => html`<a href=${addressOf("/usage", { key: budget.keyId })}>${budget.name}</a>`],
  ["Budget", (budget) => `${dollars(budget.budgetUsd)} a ${budget.budgetPeriod}`],
  ["Spent", (budget) => html`<${BudgetMeter} budget=${budget} />`],
  ["Left", (budget) => (isSpent(budget) ? html`<span class="tone-bad">nothing: its requests are refused</span>` : dollars(leftOf(budget))), "right"],
  ["Full again", (budget) => moment(budget.resetsAt), "right"],
];

const isSpent = ({ budgetUsd, spentUsd }) => Number(spentUsd) >= Number(budgetUsd);
const leftOf = ({ budgetUsd, spentUsd }) => (Number(budgetUsd) - Number(spentUsd)).toFixed(12);

// How much of a budget is spent; a dash while that is not known.
export function BudgetMeter({ budget }) {
  if (!budget) return UNKNOWN;
  const part = Math.min(Number(budget.spentUsd) / Number(budget.budgetUsd), 1);
  const text = `${dollars(budget.spentUsd)} of ${dollars(budget.budgetUsd)}`;
  return html`<span class="budget"><meter min="0" max="1" low="0.5" high="0.8" optimum="0" value=${part} aria-label=${`Spent ${text}`}></meter> ${text}</span>`;
}
