// Figures as people read them. Null is unknown, never 0: it is shown as a dash.
import { zoneNow } from "./zones.js";

export const UNKNOWN = "–";
const PLAIN = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const FINE = new Intl.NumberFormat("en", { maximumFractionDigits: 2 });
const SHORT = new Intl.NumberFormat("en", { notation: "compact", maximumFractionDigits: 1 });
const TIMES = {
  moment: { dateStyle: "medium", timeStyle: "medium" },
  clock: { timeStyle: "short" },
  day: { day: "numeric", month: "short", hour: "2-digit", minute: "2-digit" },
  zone: { timeZoneName: "short" },
};
const DAY_SECONDS = 86_400;

const writers = new Map();

// Return what writes a time in one of these ways, in the zone of the page.
function writerOf(kind) {
  const name = `${kind} ${zoneNow()}`;
  if (!writers.has(name)) writers.set(name, new Intl.DateTimeFormat("en-GB", { ...TIMES[kind], timeZone: zoneNow() }));
  return writers.get(name);
}

const percent = (value, digits) => `${(value * 100).toFixed(digits)} %`;
const isUnknown = (value) => value === null || value === undefined || Number.isNaN(value);
const known = (write) => (value) => (isUnknown(value) ? UNKNOWN : write(value));

export const count = known((value) => (value >= 100_000 ? SHORT.format(value) : PLAIN.format(value)));
export const number = known((value) => FINE.format(value));
export const short = known((value) => (Math.abs(value) < 10 ? FINE.format(value) : SHORT.format(value)));
export const share = known((value) => (value === 0 ? "0 %" : value < 0.0001 ? "< 0.01 %" : percent(value, value < 0.1 ? 2 : 1)));
export const shareMark = known((value) => `${FINE.format(value * 100)} %`);
// Rounded down: what was not up all the time never reads 100 %.
export const uptimeShare = known((value) => (value >= 1 ? "100 %" : percent(Math.floor(value * 10_000) / 10_000, 2)));
export const wholeShare = known((value) => `${PLAIN.format(value * 100)} %`);
export const moment = known((value) => writerOf("moment").format(new Date(value)));
// A time as short as it can be told apart from others of a span that is so long.
export const shortMoment = (value, seconds) => writerOf(seconds <= DAY_SECONDS ? "clock" : "day").format(new Date(value));
// The zone that every time on the page is of.
export const zone = () => `${zoneNow()} (${writerOf("zone").formatToParts(new Date()).find(({ type }) => type === "timeZoneName").value})`.replace("UTC (UTC)", "UTC");
export const dollars = known((value) => `$${trimMoney(String(value))}`);
export const exactDollars = known((value) => `$${groupThousands(String(value).replace(/(\.\d\d\d*?)0+$/, "$1"))}`);
export const gigabytes = known((value) => `${FINE.format(value)} GB`);
export const megabytes = known((value) => `${FINE.format(value / 1024)} GB`);

export const milliseconds = known((value) => {
  if (value < 10) return `${FINE.format(value)} ms`;
  if (value < 1000) return `${PLAIN.format(value)} ms`;
  return value < 60_000 ? `${FINE.format(value / 1000)} s` : duration(value / 1000);
});

// A mark of an axis: as short as it can be.
export const millisecondsMark = known((value) => (value < 1000 ? `${FINE.format(value)} ms` : `${FINE.format(value / 1000)} s`));

export const duration = known((seconds) => {
  if (seconds < 1) return `${PLAIN.format(seconds * 1000)} ms`;
  const units = [["d", 86_400], ["h", 3600], ["min", 60], ["s", 1]];
  const first = units.findIndex(([, length]) => seconds >= length);
  const [name, length] = units[first];
  const rest = units[first + 1];
  const left = rest ? Math.floor((seconds % length) / rest[1]) : 0;
  return `${Math.floor(seconds / length)} ${name}${left ? ` ${left} ${rest[0]}` : ""}`;
});

export const ago = known((seconds) => (seconds < 2 ? "just now" : `${duration(seconds)} ago`));

// Money is exact text; of a long one, two digits after the zeros are enough to read, and the whole stands in the title.
function trimMoney(text) {
  const [whole, decimals = ""] = text.split(".");
  const grouped = groupThousands(whole);
  if (!decimals || /^0*$/.test(decimals)) return grouped;
  const zeros = whole === "0" ? decimals.match(/^0*/)[0].length : 0;
  return `${grouped}.${decimals.slice(0, Math.max(2, zeros + 2)).padEnd(2, "0")}`;
}

const groupThousands = (text) => text.replace(/^\d+/, (whole) => whole.replace(/\B(?=(\d{3})+$)/g, ","));

export function plural(number_, one, many = `${one}s`) {
  return `${PLAIN.format(number_)} ${number_ === 1 ? one : many}`;
}
