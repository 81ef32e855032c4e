// What was earned, who gets what of it, what was lost by whose fault, and which periods are closed.
import { Chart } from "./chart.js";
import { count, dollars } from "./format.js";
import { Fragment, html } from "./html.js";
import { Card, Choice, Empty, Figure, Figures, Heading, Shown, Table } from "./parts.js";
import { usePolled } from "./polling.js";
import { changeQuery } from "./router.js";
import { secondsBetween, spanOf, SPANS } from "./spans.js";

const ROLES = { provider: "provider", model_owner: "model's owner", protocol: "protocol" };
const SIDES = { provider: "the provider's", network: "the network's", client: "the client's", us: "ours" };
const PAYOUT_SECONDS = 60;

const TOTALS = [
  ["Owner", (row) => row.owner ?? "the protocol"],
  ["Role", (row) => ROLES[row.role] ?? row.role],
  ["Jobs", (row) => count(row.jobs), "number"],
  ["Tokens out", (row) => count(row.tokensOut), "number"],
  ["Amount", (row) => html`<span title=${`$${row.amountUsd}`}>${dollars(row.amountUsd)}</span>`, "number"],
];
const LOSSES = [
  ["Cause", (row) => row.cause.replaceAll("_", " ")],
  ["Fault", (row) => SIDES[row.side] ?? row.side],
  ["Requests", (row) => count(row.requests), "number"],
  ["Retried elsewhere", (row) => count(row.retried), "number"],
  ["Not earned, about", (row) => dollars(row.unearnedUsd), "number"],
];
const PERIODS = [
  ["From", (row) => row.from],
  ["To", (row) => row.to],
  ["Closed", (row) => new Date(row.closedAt).toLocaleString()],
];

export function PayoutsView({ api, query }) {
  const read = (path, parameters = {}) => (signal) => api.get(path, parameters, signal);
  const payouts = usePolled(read("/payouts"), PAYOUT_SECONDS, [api]);
  const losses = usePolled(read("/payouts/losses"), PAYOUT_SECONDS, [api]);
  const periods = usePolled(read("/payouts/periods", { perPage: 12 }), PAYOUT_SECONDS, [api]);
  return html`<${Fragment}>
    <${Heading} title="Payouts" />
    <${Earned} api=${api} query=${query} />
    <${Card} title="Who gets what, this month">
      <${Shown} of=${payouts} lines=${4}>${({ totals }) => html`<${Table} caption="Payouts by owner and role" columns=${TOTALS} rows=${totals} keyOf=${(row) => `${row.owner} ${row.role}`}
        empty=${html`<${Empty} title="Nothing to be paid out yet.">Requests earn once a node names its price: pricePer1kTokens of its passport.</${Empty}>`} />`}</${Shown}>
    </${Card}>
    <${Card} title="What was lost, this month">
      <${Shown} of=${losses} lines=${3}>${({ losses: rows }) => html`<${Table} caption="Failed requests by cause" columns=${LOSSES} rows=${rows} keyOf=${(row) => `${row.cause} ${row.side}`}
        empty=${html`<${Empty} title="No request failed." />`} />`}</${Shown}>
    </${Card}>
    <${Card} title="Closed periods">
      <${Shown} of=${periods} lines=${2}>${({ periods: rows }) => html`<${Table} caption="Closed periods" columns=${PERIODS} rows=${rows} keyOf=${(row) => row.id}
        empty=${html`<${Empty} title="No period was closed yet.">An admin closes one with POST /payouts/periods; nothing of it changes after that.</${Empty}>`} />`}</${Shown}>
    </${Card}>
  </${Fragment}>`;
}

function Earned({ api, query }) {
  const span = spanOf({ span: query.span ?? "30d" });
  const metrics = usePolled((signal) => api.get("/compute/metrics", { from: `-${span}`, series: "revenueUsd,completed,tokensOut,tokensIn" }, signal), secondsBetween(span), [api, span]);
  const aside = html`<${Choice} label="Span of time" options=${SPANS} value=${span} onChange=${(chosen) => changeQuery({ span: chosen })} />`;
  return html`<${Card} title="Earned" aside=${aside}>
    <${Shown} of=${metrics} lines=${5}>${({ times, series, totals, outages }) => html`<${Fragment}>
      <${Figures} label="Earned in this span">
        <${Figure} label="revenue" value=${dollars(totals.revenueUsd)} title=${totals.revenueUsd && `$${totals.revenueUsd}`} />
        <${Figure} label="requests completed" value=${count(totals.completed)} />
        <${Figure} label="tokens out" value=${count(totals.tokensOut)} note=${totals.tokensIn === null ? "" : `${count(totals.tokensIn)} in`} />
      </${Figures}>
      <${Chart} title="Revenue" times=${times} outages=${outages} write=${dollars} axis=${dollars} lines=${[["US dollars", series.revenueUsd], ["completed", series.completed, { tableOnly: true, write: count }]]} />
    </${Fragment}>`}</${Shown}>
  </${Card}>`;
}
