// What is drawn over charts: events of a node and outages of the registry, in seconds.
const TONES = { unhealthy: "bad", revoked: "bad", stale: "warn", draining: "warn", drained: "warn", restarted: "info", healthy: "good", resumed: "good" };
const WORDS = {
  registered: "registered",
  updated: "passport changed",
  models_declared: "models declared",
  draining: "drain began",
  drained: "drained",
  resumed: "drain ended",
  deregistered: "deregistered",
  revoked: "revoked",
  restarted: "restarted",
  healthy: "healthy",
  stale: "heartbeats late",
  unhealthy: "unhealthy",
};

export function toneOf(type) {
  return TONES[type] ?? "info";
}

export function eventWord(type) {
  return WORDS[type] ?? type.replaceAll("_", " ");
}

export function lineOverlays(events, outages) {
  return {
    events: events.map((event) => ({ at: Date.parse(event.at) / 1000, type: event.type })),
    outages: outages.map((outage) => ({ from: Date.parse(outage.startedAt) / 1000, to: Date.parse(outage.endedAt) / 1000 })),
  };
}
