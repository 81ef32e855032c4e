// Webhooks: made, tested, rotated and deleted, with what was delivered.
import { Checks, Confirm, Dialog, Field, Refusal, useAction } from "./acting.js";
import { Command } from "./copying.js";
import { count, milliseconds, moment, UNKNOWN } from "./format.js";
import { Fragment, html, useState } from "./html.js";
import { Card, Empty, Heading, Pager, Shown, Table, Verdict } from "./parts.js";
import { retryAll, usePolled } from "./polling.js";
import { addressOf, changeQuery } from "./router.js";

const SECONDS = 5;
const PER_PAGE = 50;
const EVENTS = [
  "node.unhealthy", "node.recovered", "node.drained", "node.deregistered", "model.unavailable", "model.available",
].map((name) => [name, ""]);
const TONES = { delivered: "good", waiting: "warn", given_up: "bad" };

export function WebhooksView({ api, query, isAdmin }) {
  const page = Math.max(1, Number.parseInt(query.page ?? "1", 10) || 1);
  const webhooks = usePolled((signal) => api.get("/webhooks", { page, perPage: PER_PAGE, sortBy: "createdAt", sortOrder: "desc" }, signal), SECONDS, [api, page]);
  const [open, setOpen] = useState(null); // what is done, and to which webhook
  const close = () => setOpen(null);
  return html`<${Fragment}>
    <${Heading} title="Webhooks" aside=${html`<button type="button" class="primary end" onClick=${() => setOpen(["make"])}>Make a webhook</button>`} />
    <${Card} label="Webhooks found">
      <${Shown} of=${webhooks} lines=${4}>${(data) => html`<${Fragment}>
        <${Table} caption="Webhooks" columns=${columnsOf(api, setOpen)} rows=${data.webhooks} keyOf=${(one) => one.id} empty=${html`<${Empty} title="There is no webhook yet.">Events of nodes and models can be sent to a URL of yours.</${Empty}>`} />
        <${Pager} pagination=${data.pagination} noun="webhooks" onPage=${(number) => changeQuery({ page: number }, {})} />
      </${Fragment}>`}</${Shown}>
    </${Card}>
    ${query.webhook && html`<${Deliveries} api=${api} id=${query.webhook} key=${query.webhook} />`}
    ${open?.[0] === "make" && html`<${MakeWebhook} api=${api} isAdmin=${isAdmin} onClose=${close} />`}
    ${open?.[0] === "rotate" && html`<${RotateWebhook} api=${api} webhook=${open[1]} onClose=${close} />`}
    ${open?.[0] === "delete" && html`<${Confirm} title="Delete a webhook" action="Delete" onClose=${close} onDone=${retryAll} run=${() => api.change("DELETE", `/webhooks/${open[1].id}`)}>
      <p>${open[1].url} gets no more events. Deliveries that wait are not sent.</p>
    </${Confirm}>`}
  </${Fragment}>`;
}

const columnsOf = (api, setOpen) => [
  ["URL", (one) => html`<a href=${addressOf("/webhooks", { webhook: one.id })}>${one.url}</a>`],
  ["Events", (one) => (one.events.length === EVENTS.length ? "all" : one.events.join(", "))],
  ["Of", (one) => (one.allOwners ? "all owners" : one.passportIds ? `${count(one.passportIds.length)} nodes and models` : one.owner)],
  ["Status", (one) => html`<${Verdict} holds=${one.status === "active" && !one.failingSince} yes="active" no=${one.status === "active" ? "failing" : "disabled"} />${one.failingSince && html` <span class="note">since ${moment(one.failingSince)}</span>`}${one.disabledReason && html` <span class="note">${one.disabledReason}</span>`}`],
  ["Actions", (one) => html`<${RowActions} api=${api} webhook=${one} setOpen=${setOpen} />`, "right"],
];

function RowActions({ api, webhook, setOpen }) {
  const testing = useAction(() => api.change("POST", `/webhooks/${webhook.id}/test`));
  const test = async () => {
    await testing.start();
    retryAll();
  };
  return html`<span>
    <span class="buttons">
      <button type="button" disabled=${testing.isBusy} aria-label=${`Test ${webhook.url}`} onClick=${test}>${testing.isBusy ? "Testing…" : "Test"}</button>
      <button type="button" aria-label=${`Rotate the secret of ${webhook.url}`} onClick=${() => setOpen(["rotate", webhook])}>Rotate</button>
      <button type="button" class="tone-bad" aria-label=${`Delete ${webhook.url}`} onClick=${() => setOpen(["delete", webhook])}>Delete</button>
    </span>
    ${testing.result && html`<p role="status" class=${`note tone-${testing.result.delivered ? "good" : "bad"}`}>${testing.result.message}</p>`}
    <${Refusal} error=${testing.error} />
  </span>`;
}

function MakeWebhook({ api, isAdmin, onClose }) {
  const [about, setAbout] = useState({ url: "", events: EVENTS.map(([name]) => name), allOwners: false });
  const change = (name) => (value) => setAbout((former) => ({ ...former, [name]: value }));
  const isAll = about.events.length === EVENTS.length;
  const making = useAction(() => api.change("POST", "/webhooks", { url: about.url, ...(isAll ? {} : { events: about.events }), ...(about.allOwners ? { allOwners: true } : {}) }));
  const submit = async (event) => {
    event.preventDefault();
    if (await making.start()) retryAll();
  };
  if (making.result) return html`<${Secret} made=${making.result} onClose=${onClose} />`;
  return html`<${Dialog} title="Make a webhook" onClose=${onClose}><form onSubmit=${submit}>
    <${Field} name="url" label="URL" hint="a public address that this service can connect to" type="url" value=${about.url} onInput=${change("url")} error=${making.error} required autofocus />
    <${Checks} label="Events" options=${EVENTS} chosen=${about.events} onChange=${change("events")} />
    ${isAdmin && html`<label class="check"><input type="checkbox" checked=${about.allOwners} onChange=${(event) => change("allOwners")(event.currentTarget.checked)} /> Of every owner's nodes and models, not only of this login's owner</label>`}
    <${Refusal} error=${making.error} except=${["url"]} />
    <div class="dialog-buttons"><button type="button" onClick=${onClose}>Cancel</button><button type="submit" class="primary" disabled=${making.isBusy || about.events.length === 0}>Make it</button></div>
  </form></${Dialog}>`;
}

function RotateWebhook({ api, webhook, onClose }) {
  const [isNow, setNow] = useState(false);
  const rotating = useAction(() => api.change("POST", `/webhooks/${webhook.id}/rotate`, { now: isNow }));
  if (rotating.result) return html`<${Secret} made=${rotating.result} onClose=${onClose} />`;
  return html`<${Dialog} title="Rotate the secret" onClose=${onClose}><div class="fields">
    <p>Deliveries to ${webhook.url} are signed with a new secret. For 24 hours the present one signs as well.</p>
    <label class="check"><input type="checkbox" checked=${isNow} onChange=${(event) => setNow(event.currentTarget.checked)} /> End the present secret at once</label>
    <${Refusal} error=${rotating.error} />
    <div class="dialog-buttons"><button type="button" onClick=${onClose}>Cancel</button><button type="button" class="primary" disabled=${rotating.isBusy} onClick=${rotating.start}>Rotate</button></div>
  </div></${Dialog}>`;
}

function Secret({ made, onClose }) {
  return html`<${Dialog} title="The webhook's secret" onClose=${onClose}><div class="fields">
    <p>It signs the deliveries, and is shown only now. Copy it before you close this.</p>
    <${Command} text=${made.secret} what="the secret" />
    ${made.notice && html`<p class="tone-warn">${made.notice}</p>`}
    <div class="dialog-buttons"><button type="button" class="primary" onClick=${onClose}>Close</button></div>
  </div></${Dialog}>`;
}

function Deliveries({ api, id }) {
  const [page, setPage] = useState(1);
  const deliveries = usePolled((signal) => api.get(`/webhooks/${encodeURIComponent(id)}/deliveries`, { page, perPage: PER_PAGE }, signal), SECONDS, [api, id, page]);
  return html`<${Card} title="Deliveries" aside=${html`<span class="note">of the last seven days, newest first</span>`}>
    <${Shown} of=${deliveries} lines=${4}>${(data) => html`<${Fragment}>
      <${Table} caption="Deliveries" columns=${DELIVERIES} rows=${data.deliveries} keyOf=${(one) => one.id} empty=${html`<${Empty} title="Nothing was delivered yet." />`} />
      <${Pager} pagination=${data.pagination} noun="deliveries" onPage=${setPage} />
    </${Fragment}>`}</${Shown}>
  </${Card}>`;
}

const DELIVERIES = [
  ["Happened", (one) => moment(one.occurredAt)],
  ["Event", (one) => one.type],
  ["Of", (one) => (one.passportId ? html`<a href=${addressOf(`/${one.type.startsWith("model") ? "models" : "nodes"}/${one.passportId}`)}>${one.passportId.slice(0, 8)}</a>` : UNKNOWN)],
  ["State", (one) => html`<span class=${`tone-${TONES[one.state]}`}>${one.state.replace("_", " ")}</span>${one.nextAttemptAt && html` <span class="note">next try ${moment(one.nextAttemptAt)}</span>`}`],
  ["Attempts", (one) => count(one.attempts), "right"],
  ["The last one", (one) => (one.lastAttempts[0] ? `${one.lastAttempts[0].result.replaceAll("_", " ")} after ${milliseconds(one.lastAttempts[0].milliseconds)}` : UNKNOWN)],
];
