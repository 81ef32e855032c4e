// The pieces that views are put together from.
import { addressOf, changeQuery } from "./router.js";
import { count, plural } from "./format.js";
import { html, useEffect, useRef, useState } from "./html.js";
import { instantOf, offsetOf } from "./scales.js";
import { SPANS } from "./spans.js";
import { zoneNow } from "./zones.js";

const STATUS_SIGNS = { healthy: "●", unhealthy: "▲", draining: "◆", stopped: "◇", deregistered: "■" };

export function Status({ status }) {
  return html`<span class=${`status status-${status}`}><span aria-hidden="true">${STATUS_SIGNS[status] ?? "○"}</span> ${status}</span>`;
}

// An unhealthy node that said that it stops, and is silent since, is told from one that vanished.
export function statusOf(health) {
  return health.stopped && health.status === "unhealthy" ? "stopped" : health.status;
}

export function Verdict({ holds, yes, no }) {
  return html`<span class=${`status status-${holds ? "healthy" : "unhealthy"}`}>
    <span aria-hidden="true">${holds ? "●" : "▲"}</span> ${holds ? yes : no}
  </span>`;
}

// The heading of a view. It takes the focus when the view is gone to, so that it is read out.
export function Heading({ children, title, aside, crumbs = [] }) {
  const heading = useRef();
  useEffect(() => {
    document.title = `${title} · Lucid compute`;
    if (document.activeElement === document.body || document.activeElement?.closest("nav, table, .crumbs, .list")) {
      heading.current?.focus({ preventScroll: true });
    }
  }, [title]);
  return html`<header class="heading">
    ${crumbs.length > 0 && html`<nav class="crumbs" aria-label="Where you are">${crumbs.map(([text, path]) => html`<a href=${addressOf(path)}>${text}</a>`)}</nav>`}
    <div class="heading-row">
      <h1 tabindex="-1" ref=${heading}>${children ?? title}</h1>
      ${aside}
    </div>
  </header>`;
}

export function Card({ title, aside, children, label, className = "" }) {
  return html`<section class=${`card ${className}`} aria-label=${label ?? title}>
    ${title && html`<div class="card-head"><h2>${title}</h2>${aside}</div>`}
    ${children}
  </section>`;
}

export function Figure({ label, value, note, tone = "", title, href }) {
  const shown = html`<span class="value" title=${title}>${value}</span>`;
  return html`<div class=${`figure ${tone}`}>
    <dt>${label}</dt>
    <dd>${href ? html`<a href=${href} class="figure-link" aria-label=${`${value} ${label}`}>${shown}</a>` : shown}${note && html`<span class="note">${note}</span>`}</dd>
  </div>`;
}

export function Figures({ children, label }) {
  return html`<dl class="figures" aria-label=${label}>${children}</dl>`;
}

export function Empty({ title, children }) {
  return html`<div class="empty"><p class="empty-title">${title}</p>${children && html`<p>${children}</p>`}</div>`;
}

export function Loading({ lines = 3 }) {
  return html`<div class="loading" role="status"><span class="hidden">Loading</span>${Array.from({ length: lines }, (_, line) => html`<span class="bone" key=${line}></span>`)}</div>`;
}

// What went wrong, in the service's own words; that nothing answers at all is said once, by the banner.
export function Failure({ error }) {
  if (error.isUnreachable) return html`<div class="empty"><p class="empty-title">Not there at the moment</p><p>It is asked for again as soon as the service answers.</p></div>`;
  return html`<div class="failure" role="alert"><p>${error.message}</p></div>`;
}

// Shows what was read: the last of it while it is read anew, else that it is on its way or why it is not there.
export function Shown({ of, lines, children }) {
  if (of.data === undefined) return of.error ? html`<${Failure} error=${of.error} />` : html`<${Loading} lines=${lines} />`;
  return html`<div class=${`shown ${of.isLoading || of.error ? "stale" : ""}`} aria-busy=${of.isLoading}>
    ${of.error && !of.error.isUnreachable && html`<p class="failure" role="status">As it was last known. ${of.error.message}</p>`}
    ${children(of.data)}
  </div>`;
}

export function Pager({ pagination, onPage, noun }) {
  const { total, page, perPage, totalPages } = pagination;
  if (total === 0) return null;
  const first = (page - 1) * perPage + 1;
  const last = Math.min(page * perPage, total);
  return html`<nav class="pager" aria-label=${`Pages of ${noun}`}>
    <span aria-live="polite">${first > total ? "Past the end" : `${count(first)}–${count(last)}`} of ${plural(total, noun.replace(/s$/, ""), noun)}</span>
    ${totalPages > 1 && html`<span class="pager-buttons">
      <button type="button" disabled=${page <= 1} onClick=${() => onPage(page - 1)}>Previous</button>
      <span class="pager-page">${count(page)} / ${count(totalPages)}</span>
      <button type="button" disabled=${page >= totalPages} onClick=${() => onPage(page + 1)}>Next</button>
    </span>`}
  </nav>`;
}

// One of a few: a group of buttons, of which one is pressed.
export function Choice({ label, options, value, onChange }) {
  return html`<div class="choice" role="group" aria-label=${label}>
    ${options.map(([key, text, name]) => html`<button type="button" key=${key} aria-pressed=${key === value} title=${name} onClick=${() => onChange(key)}>${text}</button>`)}
  </div>`;
}

// The span of time that charts show; it stands in the address.
export function SpanChoice({ span }) {
  const [isOpen, setOpen] = useState(false);
  const choose = (chosen) => (chosen === "custom" ? setOpen(!isOpen) : changeQuery({ span: chosen, from: "", to: "" }));
  return html`<div class="span-choice">
    <${Choice} label="Span of time" options=${[...SPANS, ["custom", "custom", "a span of your own; or drag over a chart, and double-click to go back"]]} value=${span.name || "custom"} onChange=${choose} />
    ${(isOpen || !span.name) && html`<${CustomSpan} span=${span} />`}
  </div>`;
}

function CustomSpan({ span }) {
  const zone = zoneNow();
  const fieldValue = (instant) => new Date(instant + offsetOf(instant, zone)).toISOString().slice(0, 16);
  const until = span.asked.to ? Date.parse(span.asked.to) : Date.now();
  const change = (name) => (event) => {
    const chosen = Date.parse(`${event.currentTarget.value}Z`);
    if (Number.isNaN(chosen)) return;
    const instants = { from: span.since, to: new Date(until).toISOString(), [name]: new Date(instantOf(chosen, zone)).toISOString() };
    if (instants.from < instants.to) changeQuery(instants);
  };
  return html`<span class="custom-span">
    <input type="datetime-local" aria-label="From" value=${fieldValue(Date.parse(span.since))} onChange=${change("from")} />
    <span aria-hidden="true">–</span>
    <input type="datetime-local" aria-label="To" value=${fieldValue(until)} onChange=${change("to")} />
  </span>`;
}

// A table that a narrow screen shows as a list: `columns` are [heading, cell of a row, class, what it is sorted by].
// `sort` is what the rows are sorted by, with a minus before it when the highest come first.
// With `onSelect` a row can be selected, by a box in its first cell.
export function Table({ caption, columns, rows, keyOf, empty, sort, onSort, isSelected, onSelect, className = "" }) {
  if (rows.length === 0) return empty;
  return html`<div class="table-wrap"><table class=${`rows ${className}`}>
    <caption class="hidden">${caption}</caption>
    <thead><tr>${columns.map(([heading, , kind, by]) => html`<th scope="col" class=${kind} key=${heading} aria-sort=${directionOf(by, sort)}>
      ${by ? html`<button type="button" class="sort" onClick=${() => onSort(sort === `-${by}` ? by : sort === by ? `-${by}` : by === "name" ? by : `-${by}`)}>${heading}<span aria-hidden="true">${ARROWS[directionOf(by, sort)]}</span></button>` : heading}
    </th>`)}</tr></thead>
    <tbody>${rows.map((row) => html`<tr key=${keyOf(row)}>
      ${columns.map(([heading, cell, kind], position) =>
        position === 0
          ? html`<th scope="row" class=${kind} key=${heading}>${onSelect && html`<label class="select"><input type="checkbox" aria-label=${`Select ${row.name}`} checked=${isSelected(row)} onChange=${() => onSelect(row)} /></label>`}${cell(row)}</th>`
          : html`<td class=${kind} data-label=${heading} key=${heading}><div>${cell(row)}</div></td>`,
      )}
    </tr>`)}</tbody>
  </table></div>`;
}

const ARROWS = { ascending: " ↑", descending: " ↓", none: " ↕" };

function directionOf(by, sort) {
  if (!by) return undefined;
  if (sort === by) return "ascending";
  return sort === `-${by}` ? "descending" : "none";
}
