// What providers earn: their share of what was charged, by the terms that hold today.
import { dollars } from "./format.js";
import { html } from "./html.js";
import { Figure } from "./parts.js";
import { usePolled } from "./polling.js";

const TERMS_SECONDS = 600;
const ALL_BPS = 10_000;
const DAY_MS = 86_400_000;

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
