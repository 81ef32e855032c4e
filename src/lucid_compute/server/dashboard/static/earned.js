// What providers earn: their share of what was charged, by the terms that hold today; and who earns most.
import { dollars, exactDollars as exact, plural } from "./format.js";
import { html } from "./html.js";
import { Card, Empty, Figure, Shown } from "./parts.js";
import { usePolled } from "./polling.js";
import { addressOf } from "./router.js";

const TERMS_SECONDS = 600;
const ALL_BPS = 10_000;
const DAY_MS = 86_400_000;
const MONTH_SECONDS = 60;
const LISTED = 5;

// The share of providers, 0 to 1; null while it is not known, or when the service keeps no payouts.
export function useProviderShare(api) {
  const today = new Date().toISOString().slice(0, 10);
  const tomorrow = new Date(Date.now() + DAY_MS).toISOString().slice(0, 10);
  const report = usePolled((signal) => api.get("/payouts", { from: today, to: tomorrow }, signal), TERMS_SECONDS, [api, today]);
  const terms = report.data?.terms?.[0];
  return terms ? terms.providerBps / ALL_BPS : null;
}

// What is earned of what was charged, as money is written: plain decimals, of which twelve can be told apart.
export function earnedOf(charged, share) {
  if (charged === null || charged === undefined || share === null) return null;
  return (Number(charged) * share).toFixed(12).replace(/\.?0+$/, "");
}

// The main figure is what the provider gets; what was charged is the note.
export function EarnedFigure({ api, charged }) {
  const share = useProviderShare(api);
  const title = charged ? `$${charged} charged` : "";
  if (share === null) return html`<${Figure} label="charged" value=${dollars(charged)} title=${title} />`;
  return html`<${Figure} label="earned" value=${dollars(earnedOf(charged, share))} title=${title} note=${charged ? `${share * 100} % of ${dollars(charged)} charged` : ""} />`;
}

// The nodes and models that earned their providers most this month. Nothing is shown by a service without payouts.
export function MostEarned({ api }) {
  const report = usePolled((signal) => api.get("/payouts", {}, signal).catch(nothingWithoutPayouts), MONTH_SECONDS, [api]);
  if (report.data === null || report.data?.lines === null) return null; // there are too many lines to add up
  return html`<div class="pair">${[["Nodes that earned most this month", "nodes", "passportId", "node"], ["Models that earned most this month", "models", "modelId", "model"]].map(([title, path, id, name]) => html`<${Card} title=${title} key=${path} aside=${html`<a href=${addressOf("/payouts")}>Payouts</a>`}>
    <${Shown} of=${report} lines=${3}>${({ lines }) => html`<${Top} sums=${sumsOf(lines, id, name)} path=${path} />`}</${Shown}>
  </${Card}>`)}</div>`;
}

// Null is what a service without payouts answers.
export function nothingWithoutPayouts(error) {
  if (error.code === "ROUTE_NOT_FOUND") return null;
  throw error;
}

// Return what providers get, added up by node or by model: the most first.
function sumsOf(lines, id, name) {
  const sums = new Map();
  for (const line of lines.filter(({ role }) => role === "provider")) {
    const sum = sums.get(line[id]) ?? { id: line[id], name: line[name], amount: 0, jobs: 0 };
    sums.set(line[id], { ...sum, amount: sum.amount + Number(line.amountUsd), jobs: sum.jobs + line.jobs });
  }
  return [...sums.values()].sort((one, other) => other.amount - one.amount || other.jobs - one.jobs).slice(0, LISTED);
}

function Top({ sums, path }) {
  if (sums.length === 0) return html`<${Empty} title="Nothing was earned yet this month." />`;
  return html`<ol class="list">${sums.map(({ id, name, amount, jobs }) => html`<li key=${id}><a href=${addressOf(`/${path}/${id}`)}>${name ?? id}</a> <strong title=${exact(amount.toFixed(12))}>${dollars(amount.toFixed(12))}</strong> <span class="note">${plural(jobs, "request")}</span></li>`)}</ol>`;
}
