// What is drawn over charts: events of a node and outages of the registry, in milliseconds.
// Each tone has a shape of its own: for the eye as a sign, and for the canvas as an outline.
const SIGNS = { good: "▲", bad: "▼", warn: "◆", info: "■", ours: "▬" };
const OUTLINES = {
  good: [[-1, 1], [0, -1], [1, 1]],
  bad: [[-1, -1], [1, -1], [0, 1]],
  warn: [[0, -1.1], [1.1, 0], [0, 1.1], [-1.1, 0]],
  info: [[-0.8, -0.8], [0.8, -0.8], [0.8, 0.8], [-0.8, 0.8]],
};
const TONES = { unhealthy: "bad", revoked: "bad", stale: "warn", draining: "warn", drained: "warn", stopped: "warn", restarted: "info", healthy: "good", resumed: "good" };
const WORDS = {
  registered: "registered",
  updated: "passport changed",
  models_declared: "models declared",
  draining: "drain began",
  drained: "drained",
  stopped: "stopped, as it said",
  resumed: "drain ended",
  deregistered: "deregistered",
  revoked: "revoked",
  restarted: "restarted",
  healthy: "healthy",
  stale: "heartbeats late",
  unhealthy: "unhealthy",
};

export const EVENT_TYPES = Object.keys(WORDS);

export function toneOf(type) {
  return TONES[type] ?? "info";
}

export function signOf(tone) {
  return SIGNS[tone];
}

export function outlineOf(type) {
  return OUTLINES[toneOf(type)];
}

export function eventWord(type) {
  return WORDS[type] ?? type.replaceAll("_", " ");
}

export function lineOverlays(events, outages) {
  return {
    events: events.map((event) => ({ at: Date.parse(event.at), type: event.type })),
    outages: outages.map((outage) => ({ from: Date.parse(outage.startedAt), to: Date.parse(outage.endedAt) })),
  };
}
