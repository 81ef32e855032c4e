// One chart over time: drawn by uPlot, with events and outages in line with the figures, and every number in a table.
import { html, useEffect, useMemo, useRef, useState } from "./html.js";
import { moment, number, short, shortMoment, UNKNOWN } from "./format.js";
import { eventWord, lineOverlays, outlineOf, toneOf } from "./chart_overlays.js";
import { useTheme } from "./theming.js";

const HEIGHT = 170;
const PIXELS_A_SIGN = 6.4;
const FEW = 3; // so few points are shown as points
const COLOURS = ["chart-1", "chart-2", "chart-3"];
const DASHES = [[], [7, 3], [2, 3]]; // lines are told apart by their stroke as well as by their colour
const TIMES = [
  [3600 * 24 * 365, "{YYYY}", null, null, null, null, null, null, 1],
  [3600 * 24 * 28, "{MMM}", "\n{YYYY}", null, null, null, null, null, 1],
  [3600 * 24, "{D} {MMM}", "\n{YYYY}", null, null, null, null, null, 1],
  [3600, "{HH}:{mm}", "\n{D} {MMM}", null, "\n{D} {MMM}", null, null, null, 1],
  [60, "{HH}:{mm}", "\n{D} {MMM}", null, "\n{D} {MMM}", null, null, null, 1],
  [1, "{HH}:{mm}:{ss}", "\n{D} {MMM}", null, "\n{D} {MMM}", null, null, null, 1],
];

// `lines` are [label, values, {tableOnly, colour, write}]; `write` says a figure of them; `events` and `outages` are the API's.
export function Chart({ title, times, lines, write = number, axis = short, events = [], outages = [], sync }) {
  const drawn = useMemo(() => lines.filter(([, , options]) => !options?.tableOnly).map(([label, values, options], position) => [label, withoutUnfinished(times, values), options?.colour ?? COLOURS[position]]), [times, ...lines.map(([, values]) => values)]);
  const isEmpty = drawn.every(([, values]) => values.every((value) => value === null));
  const [at, setAt] = useState(null);
  const place = at ?? lastStep(drawn);
  const marks = useMemo(() => lineOverlays(events, outages), [events, outages]);
  return html`<figure class="chart" aria-label=${title}>
    <figcaption>
      <h3>${title}</h3>
      <ul class="legend">${drawn.map(([label, values, colour], position) => html`<li key=${label}>
        <${Swatch} colour=${colour} position=${position} />${label}
        <strong>${place === null ? UNKNOWN : write(values[place])}</strong>
      </li>`)}</ul>
    </figcaption>
    ${isEmpty
      ? html`<div class="chart-empty"><p>Nothing was measured in this span.</p></div>`
      : html`<${Canvas} times=${times} drawn=${drawn} axis=${axis} marks=${marks} sync=${sync} onPlace=${setAt} />`}
    <p class="chart-note" aria-hidden="true">${noteOf(times, at, place, marks)}</p>
    <${Numbers} title=${title} times=${times} lines=${lines} write=${write} />
  </figure>`;
}

function Swatch({ colour, position }) {
  return html`<svg class=${`swatch swatch-${colour}`} viewBox="0 0 18 8" width="18" height="8" aria-hidden="true"><path d="M0 4h18" stroke-width="3" stroke-dasharray=${DASHES[position].join(" ") || undefined} /></svg>`;
}

function Canvas({ times, drawn, axis, marks, sync, onPlace }) {
  const room = useRef();
  const plot = useRef(null);
  const latest = useRef(marks);
  const theme = useTheme();
  latest.current = marks;
  const data = useMemo(() => [times.map((time) => Date.parse(time) / 1000), ...drawn.map(([, values]) => values.map(asNumber))], [times, drawn]);
  useEffect(() => {
    const element = room.current;
    const made = new window.uPlot(optionsOf(element, drawn, axis, () => latest.current, sync, onPlace), data, element);
    plot.current = made;
    const observer = new ResizeObserver(() => made.setSize({ width: element.clientWidth, height: HEIGHT }));
    observer.observe(element);
    return () => {
      observer.disconnect();
      made.destroy();
    };
  }, [theme, drawn.map(([label]) => label).join()]);
  useEffect(() => {
    plot.current?.setData(data);
  }, [data, marks]);
  return html`<div class="chart-canvas" ref=${room} aria-hidden="true"></div>`;
}

function optionsOf(room, drawn, axis, marksOf, sync, onPlace) {
  const style = getComputedStyle(document.documentElement);
  const colour = (name) => style.getPropertyValue(name).trim();
  const font = `11px ${style.getPropertyValue("--font").trim()}`;
  const lines = { stroke: colour("--muted"), font, ticks: { show: false }, grid: { stroke: colour("--line"), width: 1 } };
  return {
    width: room.clientWidth || 300,
    height: HEIGHT,
    padding: [12, 20, 0, 0],
    legend: { show: false },
    cursor: { sync: sync ? { key: sync } : undefined, drag: { x: false, y: false }, points: { size: 6 }, y: false },
    scales: { y: { range: (_, __, highest) => [0, highest > 0 ? highest * 1.08 : 1] } },
    axes: [
      { ...lines, grid: { show: false }, values: TIMES, space: 64, size: 40, gap: 6 },
      { ...lines, size: widthOf, space: 36, values: (_, splits) => splits.map((split) => axis(split)) },
    ],
    series: [
      {},
      ...drawn.map(([label, , name], position) => ({
        label,
        stroke: colour(`--${name}`),
        width: 1.75,
        dash: DASHES[position],
        fill: drawn.length === 1 ? `color-mix(in srgb, ${colour(`--${name}`)} 14%, transparent)` : undefined,
        points: { show: (plot, series) => isLonely(plot.data[series]), size: 5 },
      })),
    ],
    hooks: {
      drawClear: [(plot) => drawOutages(plot, marksOf().outages, colour("--outage"))],
      draw: [(plot) => drawEvents(plot, marksOf().events, colour)],
      setCursor: [(plot) => onPlace(plot.cursor.idx ?? null)],
    },
  };
}

function drawOutages(plot, outages, colour) {
  const { ctx, bbox } = plot;
  ctx.save();
  ctx.fillStyle = colour;
  for (const { from, to } of outages) {
    const left = Math.max(plot.valToPos(from, "x", true), bbox.left);
    const right = Math.min(plot.valToPos(to, "x", true), bbox.left + bbox.width);
    if (right > left) ctx.fillRect(left, bbox.top, Math.max(right - left, 3), bbox.height);
  }
  ctx.restore();
}

function drawEvents(plot, events, colour) {
  const { ctx, bbox } = plot;
  const size = 5 * devicePixelRatio;
  ctx.save();
  ctx.lineWidth = devicePixelRatio;
  for (const event of events) {
    const x = plot.valToPos(event.at, "x", true);
    if (x < bbox.left || x > bbox.left + bbox.width) continue;
    ctx.strokeStyle = ctx.fillStyle = colour(`--${toneOf(event.type)}`);
    ctx.setLineDash([3 * devicePixelRatio, 3 * devicePixelRatio]);
    ctx.beginPath();
    ctx.moveTo(x, bbox.top);
    ctx.lineTo(x, bbox.top + bbox.height);
    ctx.stroke();
    ctx.beginPath();
    outlineOf(event.type).forEach(([right, down]) => ctx.lineTo(x + right * size, bbox.top - 1 + down * size));
    ctx.fill();
  }
  ctx.restore();
}

// Of when the numbers are: the last ones, or what the cursor points at and what happened there.
function noteOf(times, at, last, marks) {
  if (at === null) return last === null ? "" : `last: ${shortMoment(times[last], (Date.parse(times.at(-1)) - Date.parse(times[0])) / 1000)}`;
  const time = Date.parse(times[at]) / 1000;
  const step = times.length > 1 ? (Date.parse(times[1]) - Date.parse(times[0])) / 1000 : 60;
  const within = (instant) => instant >= time && instant < time + step;
  const happened = marks.events.filter((event) => within(event.at)).map((event) => eventWord(event.type));
  const isOurs = marks.outages.some((outage) => outage.from < time + step && outage.to > time);
  return [moment(times[at]), ...new Set(happened), isOurs ? "an outage of the registry, ours" : ""].filter(Boolean).join(" · ");
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
function withoutUnfinished(times, values) {
  if (times.length < 2 || values.filter((value) => value !== null).length < FEW) return values;
  const [last, before] = [Date.parse(times.at(-1)), Date.parse(times.at(-2))];
  return last + (last - before) > Date.now() ? [...values.slice(0, -1), null] : values;
}

const widthOf = (_, labels) => Math.max(40, ...(labels ?? []).map((label) => 16 + String(label).length * PIXELS_A_SIGN));
const asNumber = (value) => (value === null ? null : Number(value));
const isLonely = (values) => values.filter((value) => value !== null).length < FEW;
const newestFirst = (times) => times.map((_, place) => times.length - 1 - place);

// The last step that has ended, also when nothing was measured in it: an older figure would read as if it were now's.
export function lastStep(drawn) {
  const length = drawn[0]?.[1].length ?? 0;
  if (length === 0) return null;
  return drawn.some(([, values]) => values[length - 1] !== null) ? length - 1 : Math.max(length - 2, 0);
}

