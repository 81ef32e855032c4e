// One chart over time: its title with the unit, a legend, the plot, and every number in a table.
import { eventWord, lineOverlays } from "./chart_overlays.js";
import { moment, number, short, shortMoment, UNKNOWN } from "./format.js";
import { html, useEffect, useMemo, useRef, useState } from "./html.js";
import { Plot } from "./plot.js";
import { useTheme } from "./theming.js";
import { useZone } from "./zones.js";

const HEIGHT = 180;
const FEW = 3; // with fewer values the last step is drawn, though it goes on
const MIN_DRAG = 8;
const COLOURS = ["chart-1", "chart-2", "chart-3"];
const DASHES = [[], [7, 3], [2, 3]]; // lines are told apart by their stroke as well as by their colour
const STYLES = [...COLOURS, "muted", "line", "outage", "accent", "good", "warn", "bad", "info", "font"];

// Charts of one group point at the same instant.
const groups = new Map();

// `lines` are [label, values, {tableOnly, colour, write}]; `write` says a figure of them, `axis` a mark of the axis;
// `events` and `outages` are the API's. `onZoom(from, to)` is called with a span in milliseconds that was dragged over,
// or without one when the former span is wanted again.
export function Chart({ title, unit = "", times, lines, write = number, axis = short, isWhole = false, empty = "Nothing was measured in this span.", events = [], outages = [], sync, onZoom }) {
  const instants = useMemo(() => times.map((time) => Date.parse(time)), [times]);
  const drawn = useMemo(() => lines.filter(([, , options]) => !options?.tableOnly).map(([label, values, options], position) => [label, withoutUnfinished(instants, values).map(asNumber), options?.colour ?? COLOURS[position], DASHES[position]]), [instants, ...lines.map(([, values]) => values)]);
  const isEmpty = drawn.every(([, values]) => values.every((value) => value === null));
  const [at, setAt] = useState(null);
  const place = at ?? lastStep(drawn);
  const marks = useMemo(() => lineOverlays(events, outages), [events, outages]);
  useEffect(() => join(sync, setAt), [sync]);
  const values = (position) => write(lines.filter(([, , options]) => !options?.tableOnly)[position][1][place]);
  return html`<figure class="chart" aria-label=${title}>
    <figcaption>
      <h3>${title}${unit && html`<span class="unit">, ${unit}</span>`}</h3>
      <ul class="legend">${drawn.map(([label, , colour], position) => html`<li key=${label}>
        <${Swatch} colour=${colour} position=${position} />${label}
        <strong>${place === null ? UNKNOWN : values(position)}</strong>
      </li>`)}</ul>
    </figcaption>
    ${isEmpty
      ? html`<div class="chart-empty"><p>${empty}</p></div>`
      : html`<${Canvas} times=${instants} drawn=${drawn} axis=${axis} isWhole=${isWhole} marks=${marks} at=${at} onPoint=${(pointed) => tell(sync, pointed, setAt)} onZoom=${onZoom} values=${values} />`}
    <p class="chart-note" aria-hidden="true">${at === null && place !== null ? `last: ${shortMoment(times[place], (instants.at(-1) - instants[0]) / 1000)}` : ""}</p>
    <${Numbers} title=${title} times=${times} lines=${lines} write=${write} />
  </figure>`;
}

function join(sync, setAt) {
  if (!sync) return undefined;
  if (!groups.has(sync)) groups.set(sync, new Set());
  groups.get(sync).add(setAt);
  return () => groups.get(sync).delete(setAt);
}

function tell(sync, place, setAt) {
  (groups.get(sync) ?? [setAt]).forEach((each) => each(place));
}

function Swatch({ colour, position }) {
  return html`<svg class=${`swatch swatch-${colour}`} viewBox="0 0 18 8" width="18" height="8" aria-hidden="true"><path d="M0 4h18" stroke-width="3" stroke-dasharray=${DASHES[position].join(" ") || undefined} /></svg>`;
}

function Canvas({ times, drawn, axis, isWhole, marks, at, onPoint, onZoom, values }) {
  const canvas = useRef();
  const plot = useRef(null);
  const [width, setWidth] = useState(0);
  const [isHere, setHere] = useState(false);
  const [drag, setDrag] = useState(null); // the span in milliseconds that is being dragged over
  const theme = useTheme();
  const zone = useZone();
  const [density, setDensity] = useState(0); // dots of the screen for a CSS pixel; another screen may have more
  const style = useMemo(readStyle, [theme]);
  useEffect(() => {
    plot.current = new Plot(canvas.current);
    const follow = () => {
      setWidth(canvas.current?.parentElement.clientWidth ?? 0);
      setDensity(devicePixelRatio);
    };
    const observer = new ResizeObserver(follow);
    observer.observe(canvas.current.parentElement, { box: "device-pixel-content-box" });
    window.addEventListener("resize", follow); // also when the window is shown larger or smaller
    follow();
    return () => {
      observer.disconnect();
      window.removeEventListener("resize", follow);
    };
  }, []);
  useEffect(() => {
    if (width === 0) return;
    const lines = drawn.map(([, numbers, colour, dash]) => [numbers, colour, dash]);
    plot.current.draw({ times, lines, events: marks.events, outages: marks.outages, axis, isWhole, zone, style }, width, HEIGHT, { at, selected: drag });
  }, [times, drawn, marks, style, zone, width, density, at, drag]);

  const xOf = (event) => event.clientX - canvas.current.getBoundingClientRect().left;
  const move = (event) => {
    setHere(true);
    onPoint(plot.current.placeAt(xOf(event), times));
    if (drag) setDrag([drag[0], plot.current.timeAt(xOf(event))]);
  };
  const leave = () => {
    setHere(false);
    setDrag(null);
    onPoint(null);
  };
  const press = (event) => {
    if (!onZoom || event.button !== 0 || event.pointerType === "touch") return;
    event.preventDefault();
    setDrag([plot.current.timeAt(xOf(event)), plot.current.timeAt(xOf(event))]);
  };
  const release = () => {
    if (!drag) return;
    const [from, to] = [Math.min(...drag), Math.max(...drag)];
    setDrag(null);
    if (Math.abs(plot.current.xOf(to) - plot.current.xOf(from)) >= MIN_DRAG) onZoom(from, to);
  };
  return html`<div class="chart-canvas" aria-hidden="true">
    <canvas ref=${canvas} class=${onZoom ? "zooms" : ""} style=${{ width: `${width}px`, height: `${HEIGHT}px` }}
      onPointerMove=${move} onPointerLeave=${leave} onPointerDown=${press} onPointerUp=${release} onDblClick=${() => onZoom?.()}></canvas>
    ${isHere && at !== null && width > 0 && html`<${Tooltip} x=${plot.current.xOf(times[at])} width=${width} times=${times} at=${at} marks=${marks} drawn=${drawn} values=${values} />`}
  </div>`;
}

function Tooltip({ x, width, times, at, marks, drawn, values }) {
  const isLeft = x > width / 2;
  const style = isLeft ? { right: `${width - x + 12}px`, left: "auto" } : { left: `${x + 12}px`, right: "auto" };
  return html`<div class="tooltip" style=${style}>
    <p>${moment(times[at])}</p>
    <ul>${drawn.map(([label, , colour], position) => html`<li key=${label}><${Swatch} colour=${colour} position=${position} />${label} <strong>${values(position)}</strong></li>`)}</ul>
    ${happenedAt(times, at, marks).map((text) => html`<p key=${text}>${text}</p>`)}
  </div>`;
}

// What happened in the step that the cursor points at.
function happenedAt(times, at, marks) {
  const step = times.length > 1 ? times[1] - times[0] : 60_000;
  const [from, to] = [times[at], times[at] + step];
  const happened = marks.events.filter((event) => event.at >= from && event.at < to).map((event) => eventWord(event.type));
  const isOurs = marks.outages.some((outage) => outage.from < to && outage.to > from);
  return [...new Set(happened), ...(isOurs ? ["an outage of the registry, ours"] : [])];
}

function readStyle() {
  const style = getComputedStyle(document.documentElement);
  return Object.fromEntries(STYLES.map((name) => [name, style.getPropertyValue(`--${name}`).trim()]));
}

function Numbers({ title, times, lines, write }) {
  const [isOpen, setOpen] = useState(false);
  return html`<details class="numbers" onToggle=${(event) => setOpen(event.currentTarget.open)}>
    <summary>Numbers<span class="hidden"> of ${title}</span></summary>
    ${isOpen && html`<div class="table-wrap scrolls" tabindex="0" role="region" aria-label=${`Numbers of ${title}`}><table>
      <caption class="hidden">${title}</caption>
      <thead><tr><th scope="col">From</th>${lines.map(([label]) => html`<th scope="col" class="right" key=${label}>${label}</th>`)}</tr></thead>
      <tbody>${newestFirst(times).map((place) => html`<tr key=${times[place]}>
        <th scope="row">${moment(times[place])}</th>
        ${lines.map(([label, values, options]) => html`<td class="right" key=${label}>${(options?.write ?? write)(values[place])}</td>`)}
      </tr>`)}</tbody>
    </table></div>`}
  </details>`;
}

// The step at hand goes on: drawn, it would look like a fall. Its figures stand in the table.
function withoutUnfinished(instants, values) {
  if (instants.length < 2 || values.filter((value) => value !== null).length < FEW) return values;
  const [last, before] = [instants.at(-1), instants.at(-2)];
  return last + (last - before) > Date.now() ? [...values.slice(0, -1), null] : values;
}

const asNumber = (value) => (value === null || value === undefined ? null : Number(value));
const newestFirst = (times) => times.map((_, place) => times.length - 1 - place);

// The last step that has ended, also when nothing was measured in it: an older figure would read as if it were now's.
export function lastStep(drawn) {
  const length = drawn[0]?.[1].length ?? 0;
  if (length === 0) return null;
  return drawn.some(([, values]) => values[length - 1] !== null) ? length - 1 : Math.max(length - 2, 0);
}
