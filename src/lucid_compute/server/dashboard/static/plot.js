// Lines over time on a canvas: axes with round marks, gaps, events, outages of the registry, and a crosshair.
import { outlineOf, toneOf } from "./chart_overlays.js";
import { timeMarks, valueMarks } from "./scales.js";

const TOP = 14;
const RIGHT = 12;
const BOTTOM = 34;
const MARK_SPACE = { x: 72, y: 34 };
const GAP = 8;
const FEW = 3; // so few points are shown as points
const DAY = 86_400_000;

// `drawn` is { times, lines, events, outages, axis, isWhole, zone, style }: times in milliseconds, lines [values, colour,
// dash]; `style` has the colours by name, and the font. What is drawn is also kept in `layout`, for the pointer.
export class Plot {
  constructor(canvas) {
    this.canvas = canvas;
    this.context = canvas.getContext("2d");
    this.layout = null;
  }

  // Draw it so wide and high, in CSS pixels, on as many dots as the screen has for them.
  draw(drawn, width, height, { at = null, selected = null } = {}) {
    const { canvas, context } = this;
    const scale = devicePixelRatio || 1;
    const [across, down] = [Math.round(width * scale), Math.round(height * scale)];
    if (canvas.width !== across || canvas.height !== down) [canvas.width, canvas.height] = [across, down];
    context.setTransform(across / width, 0, 0, down / height, 0, 0);
    context.clearRect(0, 0, width, height);
    context.font = `11px ${drawn.style.font}`;
    this.layout = this.#layOut(drawn, width, height);
    this.#drawOutages(drawn);
    this.#drawAxes(drawn);
    for (const line of drawn.lines) this.#drawLine(drawn, line);
    this.#drawEvents(drawn);
    if (selected) this.#drawSelection(drawn, selected);
    if (at !== null) this.#drawCursor(drawn, at);
  }

  // Return the place in `times` that is nearest to a point of the canvas; null beside the lines.
  placeAt(x, times) {
    const { left, right } = this.layout;
    if (x < left - GAP || x > right + GAP || times.length === 0) return null;
    const time = this.timeAt(x);
    let best = 0;
    times.forEach((each, place) => {
      if (Math.abs(each - time) < Math.abs(times[best] - time)) best = place;
    });
    return best;
  }

  timeAt(x) {
    const { left, right, from, to } = this.layout;
    return from + ((Math.min(Math.max(x, left), right) - left) / (right - left || 1)) * (to - from);
  }

  xOf(time) {
    const { left, right, from, to } = this.layout;
    return left + ((time - from) / (to - from || 1)) * (right - left);
  }

  yOf(value) {
    const { top, bottom, marks } = this.layout;
    return bottom - (value / marks.at(-1)) * (bottom - top);
  }

  #layOut({ times, lines, axis, isWhole }, width, height) {
    const [top, bottom] = [TOP, height - BOTTOM];
    const highest = Math.max(0, ...lines.flatMap(([values]) => values.filter((value) => value !== null)));
    const marks = valueMarks(highest, Math.max(2, Math.floor((bottom - top) / MARK_SPACE.y)), isWhole);
    const left = Math.ceil(Math.max(24, ...marks.map((mark) => this.context.measureText(axis(mark)).width))) + GAP;
    const [from, to] = times.length > 1 ? [times[0], times.at(-1)] : [(times[0] ?? 0) - 60_000, (times[0] ?? 0) + 60_000];
    return { top, bottom, left, right: width - RIGHT, from, to, marks, highest };
  }

  #drawAxes({ axis, zone, style }) {
    const { context } = this;
    const { bottom, left, right, from, to, marks } = this.layout;
    context.fillStyle = style.muted;
    context.strokeStyle = style.line;
    context.lineWidth = 1;
    context.setLineDash([]);
    context.textAlign = "right";
    context.textBaseline = "middle";
    for (const mark of marks) {
      const y = Math.round(this.yOf(mark)) + 0.5;
      context.beginPath();
      context.moveTo(left, y);
      context.lineTo(right, y);
      context.stroke();
      context.fillText(axis(mark), left - GAP, y);
    }
    const write = writersOf(zone);
    const { step, marks: times } = timeMarks(from, to, Math.max(2, (right - left) / MARK_SPACE.x), zone);
    context.textBaseline = "top";
    let day = null;
    for (const time of times) {
      const x = this.xOf(time);
      context.textAlign = x < left + 16 ? "left" : x > right - 16 ? "right" : "center";
      const today = write.day.format(time);
      context.fillText(step < DAY ? write.clock.format(time) : today, x, bottom + GAP);
      if (step < DAY && today !== day) context.fillText(today, x, bottom + GAP + 13);
      day = today;
    }
  }

  #drawLine({ times, style, lines }, [values, colour, dash]) {
    const { context } = this;
    const stretches = stretchesOf(times, values);
    const isLonely = values.filter((value) => value !== null).length < FEW;
    context.strokeStyle = context.fillStyle = style[colour];
    context.lineWidth = 1.75;
    context.lineJoin = "round";
    context.setLineDash(dash);
    for (const stretch of stretches) {
      context.beginPath();
      stretch.forEach(([time, value], place) => context[place ? "lineTo" : "moveTo"](this.xOf(time), this.yOf(value)));
      context.stroke();
      if (lines.length === 1) this.#fillBelow(stretch);
      if (isLonely || stretch.length === 1) stretch.forEach(([time, value]) => this.#drawPoint(time, value, 2.5));
    }
    context.setLineDash([]);
  }

  #fillBelow(stretch) {
    const { context } = this;
    context.lineTo(this.xOf(stretch.at(-1)[0]), this.layout.bottom);
    context.lineTo(this.xOf(stretch[0][0]), this.layout.bottom);
    context.globalAlpha = 0.14;
    context.fill();
    context.globalAlpha = 1;
  }

  #drawPoint(time, value, radius) {
    const { context } = this;
    context.beginPath();
    context.arc(this.xOf(time), this.yOf(value), radius, 0, 2 * Math.PI);
    context.fill();
  }

  #drawOutages({ outages, style }) {
    const { context } = this;
    const { top, bottom, left, right } = this.layout;
    context.fillStyle = style.outage;
    for (const { from, to } of outages) {
      const [start, end] = [Math.max(this.xOf(from), left), Math.min(this.xOf(to), right)];
      if (end > start) context.fillRect(start, top, Math.max(end - start, 3), bottom - top);
    }
  }

  #drawEvents({ events, style }) {
    const { context } = this;
    const { top, bottom, left, right } = this.layout;
    context.lineWidth = 1;
    for (const { at, type } of events) {
      const x = this.xOf(at);
      if (x < left || x > right) continue;
      context.strokeStyle = context.fillStyle = style[toneOf(type)];
      context.setLineDash([3, 3]);
      context.beginPath();
      context.moveTo(x, top);
      context.lineTo(x, bottom);
      context.stroke();
      context.beginPath();
      outlineOf(type).forEach(([across, down]) => context.lineTo(x + across * 5, top - 3 + down * 5));
      context.fill();
    }
    context.setLineDash([]);
  }

  #drawSelection({ style }, [from, to]) {
    const { context } = this;
    const { top, bottom } = this.layout;
    context.globalAlpha = 0.18;
    context.fillStyle = style.accent;
    context.fillRect(this.xOf(Math.min(from, to)), top, Math.abs(this.xOf(to) - this.xOf(from)), bottom - top);
    context.globalAlpha = 1;
  }

  #drawCursor({ times, lines, style }, at) {
    const { context } = this;
    const { top, bottom } = this.layout;
    const x = Math.round(this.xOf(times[at])) + 0.5;
    context.strokeStyle = style.muted;
    context.lineWidth = 1;
    context.beginPath();
    context.moveTo(x, top);
    context.lineTo(x, bottom);
    context.stroke();
    for (const [values, colour] of lines) {
      if (values[at] === null || values[at] === undefined) continue;
      context.fillStyle = style[colour];
      this.#drawPoint(times[at], values[at], 3.5);
    }
  }
}

// Return the parts of a line between its gaps, as lists of [time, value].
export function stretchesOf(times, values) {
  const stretches = [];
  let isOpen = false;
  values.forEach((value, place) => {
    if (value !== null && !isOpen) stretches.push([]);
    isOpen = value !== null;
    if (isOpen) stretches.at(-1).push([times[place], value]);
  });
  return stretches;
}

const writers = new Map();

function writersOf(zone) {
  if (!writers.has(zone)) {
    writers.set(zone, {
      clock: new Intl.DateTimeFormat("en-GB", { hour: "2-digit", minute: "2-digit", timeZone: zone }),
      day: new Intl.DateTimeFormat("en-GB", { day: "numeric", month: "short", timeZone: zone }),
    });
  }
  return writers.get(zone);
}
