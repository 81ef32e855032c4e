// The span of time that charts show: the last hours or days, or one that was dragged over. It stands in the address.
import { changeQuery } from "./router.js";

export const SPANS = [
  ["1h", "1 h", "1 hour"],
  ["6h", "6 h", "6 hours"],
  ["24h", "24 h", "24 hours"],
  ["7d", "7 d", "7 days"],
  ["30d", "30 d", "30 days"],
];
const NAMES = new Set(SPANS.map(([name]) => name));
const MILLISECONDS = { h: 3_600_000, d: 86_400_000 };
const SHORTEST = 5 * 60_000; // of what is dragged over: the records have a figure a minute

// Return the span of an address: `asked` is what the API is asked for; `name` is empty for a span of one's own.
export function spanOf(query, usual = "1h") {
  const [from, to] = [Date.parse(query.from), Date.parse(query.to)];
  if (from < to) return { name: "", asked: { from: instant(from), to: instant(to) }, since: instant(from), seconds: 60 };
  const name = NAMES.has(query.span) ? query.span : usual;
  const length = Number.parseInt(name, 10) * MILLISECONDS[name.at(-1)];
  return { name, asked: { from: `-${name}` }, since: instant(Date.now() - length), seconds: name === "1h" ? 10 : 60, length };
}

// What tells two spans apart.
export const nameOf = (span) => span.name || `${span.asked.from}/${span.asked.to}`;

// Show the span between two instants in milliseconds; without them the one that was chosen last.
export function zoom(from, to) {
  if (from === undefined) return changeQuery({ from: "", to: "" });
  const middle = (from + to) / 2;
  const half = Math.max(to - from, SHORTEST) / 2;
  return changeQuery({ from: instant(middle - half), to: instant(middle + half) }, {});
}

const instant = (milliseconds) => new Date(milliseconds).toISOString();
