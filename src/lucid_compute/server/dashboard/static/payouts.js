// What was earned, who gets what of it, and what was lost by whose fault.
import { Chart } from "./chart.js";
import { SaveCsv } from "./copying.js";
import { count, dollars, exactDollars as exact, moment, plural } from "./format.js";
import { Fragment, html, useEffect, useState } from "./html.js";
import { Card, Empty, Figure, Figures, Heading, Pager, Shown, SpanChoice, Table } from "./parts.js";
import { retryAll, usePolled } from "./polling.js";
import { EarnedFigure } from "./earned.js";
import { stepUnit } from "./request_charts.js";
import { Confirm, Field } from "./acting.js";
import { addressOf, changeQuery } from "./router.js";
import { nameOf, spanOf, zoom } from "./spans.js";

const SLOW_SECONDS = 60;
const PER_PAGE = 50;
const NO_SUCH_ROUTE = "ROUTE_NOT_FOUND";
const SIDES = { provider: "the provider", network: "the network", client: "the client", us: "us" };
const ROLES = { provider: "provider", model_owner: "model owner", protocol: "protocol" };
const ownerOf = (row) => row.owner ?? "the protocol";
const roleOf = (row) => ROLES[row.role] ?? row.role;

export function PayoutsView({ api, query, owner }) {
  return html`<${Fragment}>
    <${Heading} title="Payouts" />
    <${Earned} api=${api} span=${spanOf(query, "30d")} />
    <${PaidOut} api=${api} owner=${owner} chosen=${query.period ?? ""} />
  </${Fragment}>`;
}

function Earned({ api, span }) {
  const metrics = usePolled((signal) => api.get("/compute/metrics", { ...span.asked, series: "revenueUsd,completed,tokensOut,tokensIn" }, signal), span.seconds, [api, nameOf(span)]);
  return html`<${Card} title="Earned" className="not-printed" aside=${html`<${SpanChoice} span=${span} />`}>
    <${Shown} of=${metrics} lines=${5}>${({ times, series, totals, outages }) => html`<${Fragment}>
      <${Figures} label="Earned in this span">
        <${EarnedFigure} api=${api} charged=${totals.revenueUsd} />
        <${Figure} label="requests completed" value=${count(totals.completed)} />
        <${Figure} label="tokens out" value=${count(totals.tokensOut)} note=${totals.tokensIn === null ? "" : `${count(totals.tokensIn)} in`} />
      </${Figures}>
      <${Chart} title="Charged" unit=${stepUnit(times)} onZoom=${zoom} times=${times} outages=${outages} write=${dollars} axis=${dollars} lines=${[["US dollars", series.revenueUsd], ["completed", series.completed, { tableOnly: true, write: count }]]} />
    </${Fragment}>`}</${Shown}>
  </${Card}>`;
}

function PaidOut({ api, owner, chosen }) {
  const periods = usePolled((signal) => periodsOf(api, signal), SLOW_SECONDS, [api]);
  if (periods.data === null) {
    return html`<${Card} title="Payouts"><${Empty} title="This service keeps no payouts.">What was earned stands above; every request's price stands with its node.</${Empty}></${Card}>`;
  }
  return html`<${Shown} of=${periods} lines=${4}>${(data) => html`<${Period} api=${api} owner=${owner} chosen=${chosen} periods=${data.periods} />`}</${Shown}>`;
}

// Answers the closed periods; null when the service has no payouts.
async function periodsOf(api, signal) {
  try {
    return await api.get("/payouts/periods", { perPage: 24 }, signal);
  } catch (error) {
    if (error.code === NO_SUCH_ROUTE) return null;
    throw error;
  }
}

function Period({ api, owner, chosen, periods }) {
  const [isWhole, setWhole] = useState(false);
  const [isClosing, setClosing] = useState(false);
  useEffect(() => {
    if (!isWhole) return;
    print(); // with every line, and not the page of them at hand
    setWhole(false);
  }, [isWhole]);
  const closed = periods.find((period) => period.id === chosen);
  const days = closed ?? daysOf(chosen);
  const path = closed ? `/payouts/periods/${closed.id}` : "/payouts";
  const asked = closed ? {} : days;
  const report = usePolled((signal) => api.get(path, asked, signal), SLOW_SECONDS, [api, path, days.from]);
  const losses = usePolled((signal) => api.get("/payouts/losses", { from: days.from, to: days.to }, signal), SLOW_SECONDS, [api, days.from, days.to]);
  const options = [["", "this month"], ["last", "last month"], ...periods.map((period) => [period.id, `closed ${period.from} to ${period.to}`])];
  return html`<${Fragment}>
    <${Card} title=${closed ? "Payouts / closed period" : "Payouts / open month"} aside=${html`<${Statement} api=${api} path=${path} asked=${asked} days=${days} onPrint=${() => setWhole(true)} />`}>
      <p class="printed">${`${owner ?? "all owners"} · ${days.from} to ${days.to}, the last day not included, in UTC · printed ${moment(new Date())}`}</p>
      <div class="field narrow"><label for="period">Period, in UTC</label><select id="period" value=${chosen} onChange=${(event) => changeQuery({ period: event.currentTarget.value })}>
        ${options.map(([value, text]) => html`<option value=${value} key=${value}>${text}</option>`)}
      </select></div>
      <p class="note">${closed ? "Closed: nothing of it changes any more." : "Open: it grows with each request that ends."}</p>
      ${!closed && owner === null && html`<p class="not-printed"><button type="button" onClick=${() => setClosing(true)}>Close a period</button></p>`}
      ${isClosing && html`<${ClosePeriod} api=${api} last=${periods[0]} onClose=${() => setClosing(false)} />`}
      <${Shown} of=${report} lines=${4}>${(data) => html`<${Report} data=${data} isWhole=${isWhole} key=${path + days.from} />`}</${Shown}>
    </${Card}>
    <${Card} title="Lost" aside=${html`<span class="note">what failed and refused requests would have earned, by whose fault; estimates</span>`}>
      <${Shown} of=${losses} lines=${3}>${(data) => html`<${Table} caption="Losses by cause" columns=${LOSSES} rows=${data.losses} keyOf=${(loss) => `${loss.cause}/${loss.side}`} empty=${html`<${Empty} title="Nothing was lost." />`} />`}</${Shown}>
    </${Card}>
  </${Fragment}>`;
}

// Closing is final. A period begins where the last one ended; its last day is not included.
function ClosePeriod({ api, last, onClose }) {
  const [days, setDays] = useState({ from: last?.to ?? daysOf("last").from, to: daysOf("").from });
  const change = (name) => (value) => setDays((former) => ({ ...former, [name]: value }));
  const done = (period) => {
    changeQuery({ period: period.id });
    retryAll();
  };
  return html`<${Confirm} title="Close a period" action="Close it" word=${days.to} onClose=${onClose} onDone=${done} run=${() => api.change("POST", "/payouts/periods", days)}>
    <p>Everything that was billed before its end is in it, and nothing of it changes any more. This is final.</p>
    <div class="pair">
      <${Field} name="from" label="First day, in UTC" type="date" value=${days.from} onInput=${change("from")} />
      <${Field} name="to" label="The day after the last one" type="date" value=${days.to} onInput=${change("to")} />
    </div>
  </${Confirm}>`;
}

// Answers the whole month at hand, or the one before, in UTC.
function daysOf(chosen) {
  const now = new Date();
  const month = now.getUTCMonth() - (chosen === "last" ? 1 : 0);
  const day = (offset) => new Date(Date.UTC(now.getUTCFullYear(), month + offset, 1)).toISOString().slice(0, 10);
  return { from: day(0), to: day(1) };
}

function Report({ data, isWhole }) {
  const [page, setPage] = useState(1);
  const lines = data.lines ?? []; // null when there are too many
  const totalPages = Math.ceil(lines.length / PER_PAGE);
  if (data.totals.length === 0) return html`<${Empty} title="Nothing was earned in this period." />`;
  return html`<${Fragment}>
    <${Table} caption="Totals" columns=${TOTALS} rows=${data.totals} keyOf=${(total) => `${total.owner}/${total.role}`} />
    <h3 class="apart">By node and model</h3>
    ${data.lines === null && html`<p class="note">There are too many lines of all owners: a statement of one owner has its own.</p>`}
    <${Table} caption="By node and model" columns=${LINES} rows=${isWhole ? lines : lines.slice((page - 1) * PER_PAGE, page * PER_PAGE)} keyOf=${(line) => [line.owner, line.role, line.passportId, line.modelId].join("/")} />
    <${Pager} pagination=${{ total: lines.length, page, perPage: PER_PAGE, totalPages }} noun="lines" onPage=${setPage} />
    <p class="note">${data.terms.map((terms) => `${terms.since.startsWith("1970") ? "From the beginning" : `Since ${terms.since.slice(0, 10)}`}: ${terms.providerBps / 100} % provider, ${terms.modelOwnerBps / 100} % model owner, ${terms.protocolBps / 100} % protocol.`).join(" ")}</p>
  </${Fragment}>`;
}

// The statement on paper and as CSV.
function Statement({ api, path, asked, days, onPrint }) {
  return html`<span class="buttons"><button type="button" onClick=${onPrint}>Print</button><${SaveCsv} api=${api} path=${path} asked=${asked} name=${`payouts-${days.from}-${days.to}`} /></span>`;
}

const TOTALS = [
  ["Who", ownerOf],
  ["As", roleOf],
  ["Requests", (total) => count(total.jobs), "right"],
  ["Tokens in", (total) => count(total.tokensIn), "right"],
  ["Tokens out", (total) => count(total.tokensOut), "right"],
  ["Charged", (total) => exact(total.grossUsd), "right"],
  ["Gets", (total) => exact(total.amountUsd), "right"],
];
const LINES = [
  ["Who", ownerOf],
  ["As", roleOf],
  ["Node", (line) => (line.passportId ? html`<a href=${addressOf(`/nodes/${line.passportId}`)}>${line.node ?? line.passportId}</a>` : "\u2013")],
  ["Model", (line) => line.model],
  ["Requests", (line) => count(line.jobs), "right"],
  ["Charged", (line) => exact(line.grossUsd), "right"],
  ["Gets", (line) => exact(line.amountUsd), "right"],
];
const LOSSES = [
  ["Cause", (loss) => loss.cause.replaceAll("_", " ")],
  ["Fault of", (loss) => SIDES[loss.side] ?? loss.side],
  ["Failed", (loss) => plural(loss.requests, "request"), "right"],
  ["Refused", (loss) => count(loss.refused), "right"],
  ["Made up for elsewhere", (loss) => count(loss.retried), "right"],
  ["Not earned", (loss) => exact(loss.unearnedUsd), "right"],
  ["Earned by others", (loss) => exact(loss.passedOnUsd), "right"],
];
