// The marks of a chart's axes: round values up to one at or above the highest, and round times of a zone. Pure.
const MINUTE = 60_000;
const HOUR = 60 * MINUTE;
const DAY = 24 * HOUR;
const TIME_STEPS = [
  MINUTE, 2 * MINUTE, 5 * MINUTE, 10 * MINUTE, 15 * MINUTE, 30 * MINUTE, HOUR, 2 * HOUR, 3 * HOUR, 6 * HOUR, 12 * HOUR,
  DAY, 2 * DAY, 7 * DAY, 14 * DAY, 28 * DAY, 91 * DAY, 365 * DAY,
];
const ROUND = [1, 2, 2.5, 5, 10];
const MONDAY = 4 * DAY; // the first one after 1970 began
const clocks = new Map();

// Return values from 0 up to one at or above the highest, `most` steps at most; `isWhole` for what is counted.
export function valueMarks(highest, most, isWhole = false) {
  const top = highest > 0 ? highest : 1;
  const size = 10 ** Math.floor(Math.log10(top / most));
  const fits = (step) => Math.ceil(top / step - 1e-9) <= most && (!isWhole || Number.isInteger(step));
  const step = ROUND.map((round) => Number((round * size).toPrecision(3))).find(fits) ?? 1;
  const steps = Math.max(1, Math.ceil(top / step - 1e-9));
  return Array.from({ length: steps + 1 }, (_, place) => Number((place * step).toPrecision(12)));
}

// Return the round instants of a span in milliseconds, `most` at most: whole minutes, hours or days of the zone's clock.
export function timeMarks(from, to, most, zone) {
  const step = TIME_STEPS.find((each) => (to - from) / each <= most) ?? TIME_STEPS.at(-1);
  const phase = step >= 7 * DAY ? MONDAY : 0;
  const marks = [];
  for (let local = Math.ceil((from + offsetOf(from, zone) - phase) / step) * step + phase; ; local += step) {
    const instant = instantOf(local, zone);
    if (instant > to) return { step, marks };
    if (instant >= from && instant !== marks.at(-1)) marks.push(instant);
  }
}

// Return by how much the zone's clock is ahead of UTC at an instant, in milliseconds.
export function offsetOf(instant, zone) {
  if (zone === "UTC") return 0;
  const parts = Object.fromEntries(clockOf(zone).formatToParts(instant).map(({ type, value }) => [type, Number(value)]));
  const local = Date.UTC(parts.year, parts.month - 1, parts.day, parts.hour, parts.minute, parts.second);
  return local - Math.floor(instant / 1000) * 1000;
}

// Return the instant at which the zone's clock shows a time; it is written as if that were UTC.
export function instantOf(local, zone) {
  const first = local - offsetOf(local, zone);
  return local - offsetOf(first, zone);
}

function clockOf(zone) {
  if (!clocks.has(zone)) {
    const whole = { year: "numeric", month: "numeric", day: "numeric", hour: "numeric", minute: "numeric", second: "numeric" };
    clocks.set(zone, new Intl.DateTimeFormat("en-US", { ...whole, hourCycle: "h23", timeZone: zone }));
  }
  return clocks.get(zone);
}
