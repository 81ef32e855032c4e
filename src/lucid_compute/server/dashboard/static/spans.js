// The spans of time that charts show, and how often what they show is read anew.
export const SPANS = [
  ["1h", "1 h", "1 hour"],
  ["6h", "6 h", "6 hours"],
  ["24h", "24 h", "24 hours"],
  ["7d", "7 d", "7 days"],
  ["30d", "30 d", "30 days"],
];
const NAMES = new Set(SPANS.map(([name]) => name));
const MILLISECONDS = { h: 3_600_000, d: 86_400_000 };

export const spanOf = (query) => (NAMES.has(query.span) ? query.span : "1h");
export const secondsBetween = (span) => (span === "1h" ? 10 : 60);
export const sinceOf = (span) => new Date(Date.now() - Number.parseInt(span, 10) * MILLISECONDS[span.at(-1)]).toISOString();
