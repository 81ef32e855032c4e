// What was earned, and what is paid out of it.
import { Chart } from "./chart.js";
import { count, dollars } from "./format.js";
import { Fragment, html } from "./html.js";
import { Card, Choice, Empty, Figure, Figures, Heading, Shown } from "./parts.js";
import { usePolled } from "./polling.js";
import { changeQuery } from "./router.js";
import { secondsBetween, spanOf, SPANS } from "./spans.js";

export function PayoutsView({ api, query }) {
  const span = spanOf({ span: query.span ?? "30d" });
  const metrics = usePolled((signal) => api.get("/compute/metrics", { from: `-${span}`, series: "revenueUsd,completed,tokensOut,tokensIn" }, signal), secondsBetween(span), [api, span]);
  const aside = html`<${Choice} label="Span of time" options=${SPANS} value=${span} onChange=${(chosen) => changeQuery({ span: chosen })} />`;
  return html`<${Fragment}>
    <${Heading} title="Payouts" />
    <${Card} title="Earned" aside=${aside}>
      <${Shown} of=${metrics} lines=${5}>${({ times, series, totals, outages }) => html`<${Fragment}>
        <${Figures} label="Earned in this span">
          <${Figure} label="revenue" value=${dollars(totals.revenueUsd)} title=${totals.revenueUsd && `$${totals.revenueUsd}`} />
          <${Figure} label="requests completed" value=${count(totals.completed)} />
          <${Figure} label="tokens out" value=${count(totals.tokensOut)} note=${totals.tokensIn === null ? "" : `${count(totals.tokensIn)} in`} />
        </${Figures}>
        <${Chart} title="Revenue" times=${times} outages=${outages} write=${dollars} axis=${dollars} lines=${[["US dollars", series.revenueUsd], ["completed", series.completed, { tableOnly: true, write: count }]]} />
      </${Fragment}>`}</${Shown}>
    </${Card}>
    <${Card} title="Paid out">
      <${Empty} title="This service does not keep payouts yet.">What was earned stands above, to the last digit; every request's price stands with its node.</${Empty}>
    </${Card}>
  </${Fragment}>`;
}
