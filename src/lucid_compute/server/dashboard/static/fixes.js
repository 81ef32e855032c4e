// What to fix about a node: each reason in the service's own words, with the command that goes at it.
import { Command } from "./copying.js";
import { duration, share } from "./format.js";
import { html } from "./html.js";

const MAX_SKEW_SECONDS = 5;
const MUCH_ERROR = 0.05;
const COMMANDS = {
  HEARTBEAT_MISSING: () => ["On its machine, beside its inference server, start its heartbeats:", "lucid agent run"],
  HEARTBEAT_STALE: () => ["On its machine, see whether its agent runs (as a service: systemctl status lucid-agent), and start it if not:", "lucid agent run"],
  NOT_CONNECTED: () => ["On its machine, start its agent, or see in its log why it does not connect:", "lucid agent run --outbound"],
  DRAINING: (id, health) => health.reported?.status === "draining" ? ["On its machine, start its agent again:", "lucid agent run"] : ["To send it requests again:", `lucid resume ${id}`],
  CLOCK_SKEW: () => ["On its machine, see whether its clock is kept right:", "timedatectl status"],
  ERRORS: (id) => ["What failed, request by request:", `lucid jobs --node ${id} --outcome failed`],
};

export function Fixes({ node, health }) {
  const fixes = fixesOf(health);
  if (fixes.length === 0) return null;
  return html`<section class="card fix" aria-label="What to fix">
    <div class="card-head"><h2>What to fix</h2></div>
    <ul class="fixes">${fixes.map(([code, message, detail]) => html`<li key=${code}>
      <p><span class="code">${code}</span> ${inPlace(message, node.id)} ${detail && html`<span class="note">${detail}</span>`}</p>
      <${How} code=${code} id=${node.id} health=${health} />
    </li>`)}</ul>
    <p class="note">Whatever it is, this looks at everything from the node's machine and gives one fix for each failure:</p>
    <${Command} text=${`lucid doctor ${node.id}`} />
  </section>`;
}

function How({ code, id, health }) {
  if (!(code in COMMANDS)) return null;
  const [text, command] = COMMANDS[code](id, health);
  return html`<p class="note">${text}</p><${Command} text=${command} />`;
}

function fixesOf(health) {
  // A node that stopped as it said is silent for that reason alone, and one command starts it again.
  const reasons = health.stopped ? health.reasons.filter(({ code }) => code !== "HEARTBEAT_STALE") : health.reasons;
  const fixes = reasons.map((reason) => [reason.code, reason.message, health.reported?.detail ?? ""]);
  const skew = health.reported?.clockOffsetSeconds ?? 0;
  if (Math.abs(skew) > MAX_SKEW_SECONDS) fixes.push(["CLOCK_SKEW", `The node's clock is ${duration(Math.abs(skew))} ${skew > 0 ? "ahead" : "behind"}; set it by NTP.`, "Nothing is decided by it here."]);
  if (health.errorRate > MUCH_ERROR) fixes.push(["ERRORS", `${share(health.errorRate)} of the last hour's requests failed on the node.`, "The failures by reason stand below."]);
  return fixes;
}

// Where a message names an address of the API, the node's own id stands in it.
export function inPlace(message, id) {
  return message.replaceAll("{passportId}", id);
}
