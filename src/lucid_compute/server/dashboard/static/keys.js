// API keys: made, edited, rotated and revoked. Only an admin's key may.
import { Checks, Confirm, Dialog, Field, Refusal, Undo, typedNumber, useAction } from "./acting.js";
import { Command } from "./copying.js";
import { count, dollars, moment, UNKNOWN } from "./format.js";
import { Fragment, html, useState } from "./html.js";
import { Card, Empty, Heading, Pager, Shown, Table } from "./parts.js";
import { retryAll, usePolled } from "./polling.js";
import { addressOf, changeQuery } from "./router.js";
import { Typed } from "./nodes.js";

const SECONDS = 10;
const PER_PAGE = 50;
const DAY_MS = 86_400_000;
const SCOPES = [
  ["inference:run", "send requests to models"],
  ["compute", "register nodes, send heartbeats, drain"],
  ["passports:read", "read nodes, models and records"],
  ["passports:write", "register and change models"],
  ["admin", "everything, of all owners"],
];
const KEEP = "keep"; // the end stays
const ENDS = [["", "never"], ["30", "in 30 days"], ["90", "in 90 days"], ["365", "in a year"]];

export function KeysView({ api, query }) {
  const page = Math.max(1, Number.parseInt(query.page ?? "1", 10) || 1);
  const asked = { owner: query.owner ?? "", page, perPage: PER_PAGE, sortBy: "createdAt", sortOrder: "desc" };
  const keys = usePolled((signal) => api.get("/keys", asked, signal), SECONDS, [api, JSON.stringify(asked)]);
  const [open, setOpen] = useState(query.add === "key" ? ["make"] : null); // what is done, and to which key
  const [edited, setEdited] = useState(null); // the key before its last edit
  const close = () => {
    setOpen(null);
    changeQuery({ add: "" });
  };
  return html`<${Fragment}>
    <${Heading} title="Keys" aside=${html`<button type="button" class="primary end" onClick=${() => setOpen(["make"])}>Make a key</button>`} />
    <form class="filters" role="search" aria-label="Filter keys" onSubmit=${(event) => event.preventDefault()}><${Typed} name="owner" label="Owner" value=${query.owner ?? ""} /></form>
    ${edited && html`<${Undo} text=${`${edited.name} was changed.`} run=${() => api.change("PATCH", `/keys/${edited.id}`, restored(edited))} onEnd=${() => setEdited(null)} key=${JSON.stringify(edited)} />`}
    <${Card} label="Keys found">
      <${Shown} of=${keys} lines=${6}>${(data) => html`<${Fragment}>
        <${Table} caption="Keys" columns=${columnsOf(setOpen)} rows=${data.keys} keyOf=${(key) => key.id} empty=${html`<${Empty} title="No key is like that." />`} />
        <${Pager} pagination=${data.pagination} noun="keys" onPage=${(number) => changeQuery({ page: number }, {})} />
      </${Fragment}>`}</${Shown}>
    </${Card}>
    ${open?.[0] === "make" && html`<${MakeKey} api=${api} onClose=${close} />`}
    ${open?.[0] === "edit" && html`<${EditKey} api=${api} made=${open[1]} onClose=${close} onDone=${setEdited} />`}
    ${open?.[0] === "rotate" && html`<${RotateKey} api=${api} made=${open[1]} onClose=${close} />`}
    ${open?.[0] === "revoke" && html`<${Confirm} title=${`Revoke ${open[1].name}`} action="Revoke" word=${open[1].name} onClose=${close} onDone=${retryAll} run=${() => api.change("DELETE", `/keys/${open[1].id}`)}>
      <p>Requests with it are refused from now on, on all replicas within two seconds. This is final.</p>
    </${Confirm}>`}
  </${Fragment}>`;
}

const columnsOf = (setOpen) => [
  ["Key", (key) => html`<strong>${key.name}</strong> <span class="id">${key.prefix}…${key.lastFour}</span>`],
  ["Owner", (key) => key.owner],
  ["May", (key) => key.scopes.join(", ")],
  ["Limits", (key) => limitsOf(key.limits)],
  ["Last used", (key) => (key.lastUsedAt ? moment(key.lastUsedAt) : "never")],
  ["Ends", (key) => (key.expiresAt ? html`<span class=${Date.parse(key.expiresAt) < Date.now() ? "tone-bad" : ""}>${moment(key.expiresAt)}</span>` : "never")],
  ["Actions", (key) => html`<span class="buttons"><a class="button" aria-label=${`Usage of ${key.name}`} href=${addressOf("/usage", { key: key.id, owner: key.owner })}>Usage</a><button type="button" aria-label=${`Edit ${key.name}`} onClick=${() => setOpen(["edit", key])}>Edit</button><button type="button" aria-label=${`Rotate ${key.name}`} onClick=${() => setOpen(["rotate", key])}>Rotate</button><button type="button" class="tone-bad" aria-label=${`Revoke ${key.name}`} onClick=${() => setOpen(["revoke", key])}>Revoke</button></span>`, "right"],
];

const NO_LIMITS = { requestsPerMinute: "", tokensPerMinute: "", concurrency: "", budgetUsd: "", budgetPeriod: "month", models: "" };
const PERIODS = [["month", "a month"], ["day", "a day"]];

// Return a key's limits in words.
export function limitsOf(limits) {
  const { requestsPerMinute, tokensPerMinute, concurrency, budgetUsd, budgetPeriod, models } = limits ?? {};
  const parts = [
    requestsPerMinute && `${count(requestsPerMinute)} requests a minute`,
    tokensPerMinute && `${count(tokensPerMinute)} tokens a minute`,
    concurrency && `${count(concurrency)} requests at once`,
    budgetUsd && `${dollars(budgetUsd)} a ${budgetPeriod}`,
    models && `models ${models.join(", ")}`,
  ].filter(Boolean);
  return parts.length > 0 ? parts.join(", ") : UNKNOWN;
}

// Return the limits of a form as the API has them; what is empty is left out.
function typedLimits(typed) {
  const models = typed.models.split(",").map((name) => name.trim()).filter(Boolean);
  const numbers = ["requestsPerMinute", "tokensPerMinute", "concurrency"].filter((name) => typed[name]).map((name) => [name, typedNumber(typed[name])]);
  return { ...Object.fromEntries(numbers), ...(typed.budgetUsd ? { budgetUsd: typed.budgetUsd, budgetPeriod: typed.budgetPeriod } : {}), ...(models.length > 0 ? { models } : {}) };
}

function Limits({ typed, onChange, error }) {
  const change = (name) => (value) => onChange({ ...typed, [name]: value });
  return html`<${Fragment}>
    <div class="pair">
      <${Field} name="requestsPerMinute" label="Requests a minute, at most" hint="empty: no limit" inputmode="numeric" value=${typed.requestsPerMinute} onInput=${change("requestsPerMinute")} error=${error} />
      <${Field} name="tokensPerMinute" label="Tokens a minute, at most" hint="empty: no limit" inputmode="numeric" value=${typed.tokensPerMinute} onInput=${change("tokensPerMinute")} error=${error} />
      <${Field} name="budgetUsd" label="Budget, in US dollars" hint="empty: no budget" inputmode="decimal" value=${typed.budgetUsd} onInput=${change("budgetUsd")} error=${error} />
      <${Field} name="budgetPeriod" label="It is for" hint="in UTC" options=${PERIODS} value=${typed.budgetPeriod} onInput=${change("budgetPeriod")} error=${error} />
      <${Field} name="concurrency" label="Requests at once, at most" hint="empty: no limit" inputmode="numeric" value=${typed.concurrency} onInput=${change("concurrency")} error=${error} />
      <${Field} name="models" label="Only these models" hint="with commas between; llama-* is a pattern" value=${typed.models} onInput=${change("models")} error=${error} />
    </div>
  </${Fragment}>`;
}

function MakeKey({ api, onClose }) {
  const [about, setAbout] = useState({ name: "", owner: "", scopes: ["inference:run"], passportId: "", days: "", limits: NO_LIMITS });
  const change = (name) => (value) => setAbout((former) => ({ ...former, [name]: value }));
  const making = useAction(() => api.change("POST", "/keys", bodyOf(about)));
  const submit = async (event) => {
    event.preventDefault();
    if (await making.start()) retryAll();
  };
  if (making.result) return html`<${Made} made=${making.result} onClose=${onClose} />`;
  return html`<${Dialog} title="Make a key" onClose=${onClose}><form onSubmit=${submit}>
    <${Field} name="name" label="Name" hint="what it is for" value=${about.name} onInput=${change("name")} error=${making.error} required autofocus />
    <${Field} name="owner" label="Owner" hint="whose nodes and requests it is for" value=${about.owner} onInput=${change("owner")} error=${making.error} required />
    <${Checks} label="It may" options=${SCOPES} chosen=${about.scopes} onChange=${change("scopes")} />
    ${about.scopes.includes("compute") && html`<${Field} name="passportId" label="Only for the node with this id" hint="empty: for every node of the owner" value=${about.passportId} onInput=${change("passportId")} error=${making.error} />`}
    <${Field} name="expiresAt" label="It ends" options=${ENDS} value=${about.days} onInput=${change("days")} error=${making.error} />
    <${Limits} typed=${about.limits} onChange=${change("limits")} error=${making.error} />
    <${Refusal} error=${making.error} except=${["name", "owner", "passportId", "expiresAt", ...Object.keys(NO_LIMITS)]} />
    <div class="dialog-buttons"><button type="button" onClick=${onClose}>Cancel</button><button type="submit" class="primary" disabled=${making.isBusy || about.scopes.length === 0}>Make it</button></div>
  </form></${Dialog}>`;
}

const endIn = (days) => new Date(Date.now() + Number(days) * DAY_MS).toISOString();

function bodyOf({ name, owner, scopes, passportId, days, limits: typed }) {
  const limits = typedLimits(typed);
  return {
    name, owner, scopes,
    ...(passportId && scopes.includes("compute") ? { passportId } : {}),
    ...(days ? { expiresAt: endIn(days) } : {}),
    ...(Object.keys(limits).length > 0 ? { limits } : {}),
  };
}

// Name, end and limits can be changed; owner, scopes and node are fixed. Only what was changed is sent.
function EditKey({ api, made, onClose, onDone }) {
  const [about, setAbout] = useState({ name: made.name, days: KEEP, limits: typedOf(made.limits) });
  const change = (name) => (value) => setAbout((former) => ({ ...former, [name]: value }));
  const patch = patchOf(made, about);
  const saving = useAction(() => api.change("PATCH", `/keys/${made.id}`, patch));
  const submit = async (event) => {
    event.preventDefault();
    if (!(await saving.start())) return;
    retryAll();
    onDone(made);
    onClose();
  };
  const ends = [[KEEP, made.expiresAt ? `as it is: ${moment(made.expiresAt)}` : "as it is: never"], ...ENDS.filter(([days]) => days || made.expiresAt)];
  return html`<${Dialog} title=${`Edit ${made.name}`} onClose=${onClose}><form onSubmit=${submit}>
    <p class="note">Its secret, owner and scopes stay. All replicas know the change within two seconds. What it has spent counts on.</p>
    <${Field} name="name" label="Name" value=${about.name} onInput=${change("name")} error=${saving.error} required autofocus />
    <${Field} name="expiresAt" label="It ends" options=${ends} value=${about.days} onInput=${change("days")} error=${saving.error} />
    <${Limits} typed=${about.limits} onChange=${change("limits")} error=${saving.error} />
    <${Refusal} error=${saving.error} except=${["name", "expiresAt", ...Object.keys(NO_LIMITS)]} />
    <div class="dialog-buttons"><button type="button" onClick=${onClose}>Cancel</button><button type="submit" class="primary" disabled=${saving.isBusy || Object.keys(patch).length === 0}>Save</button></div>
  </form></${Dialog}>`;
}

// Return a key's limits as a form has them.
function typedOf(limits) {
  const { models, ...others } = limits ?? {};
  const known = Object.entries(others).filter(([, value]) => value !== null).map(([name, value]) => [name, String(value)]);
  return { ...NO_LIMITS, ...Object.fromEntries(known), models: (models ?? []).join(", ") };
}

// Return what a form changes of a key, as the API takes it: a limit that was emptied is null.
function patchOf(made, { name, days, limits: typed }) {
  const [former, wanted] = [typedLimits(typedOf(made.limits)), typedLimits(typed)];
  const changed = Object.keys({ ...former, ...wanted }).filter((limit) => JSON.stringify(former[limit]) !== JSON.stringify(wanted[limit]));
  return {
    ...(name === made.name ? {} : { name }),
    ...(days === KEEP ? {} : { expiresAt: days === "" ? null : endIn(days) }),
    ...(changed.length === 0 ? {} : { limits: Object.fromEntries(changed.map((limit) => [limit, wanted[limit] ?? null])) }),
  };
}

// Return the change that gives a key back what it had. An end that has passed can't be given again.
function restored({ name, expiresAt, limits }) {
  const isOver = expiresAt && Date.parse(expiresAt) < Date.now();
  const none = Object.fromEntries(Object.keys(NO_LIMITS).map((limit) => [limit, null]));
  return { name, ...(isOver ? {} : { expiresAt }), limits: { ...none, ...limits } };
}

function RotateKey({ api, made, onClose }) {
  const [isNow, setNow] = useState(false);
  const rotating = useAction(() => api.change("POST", `/keys/${made.id}/rotate`, { now: isNow }));
  const rotate = async () => (await rotating.start()) && retryAll();
  if (rotating.result) return html`<${Made} made=${rotating.result} onClose=${onClose} />`;
  return html`<${Dialog} title=${`Rotate ${made.name}`} onClose=${onClose}><div class="fields">
    <p>It gets a new secret. The present one stays valid for 24 hours, so that it can be replaced meanwhile.</p>
    <label class="check"><input type="checkbox" checked=${isNow} onChange=${(event) => setNow(event.currentTarget.checked)} /> End the present secret at once</label>
    <${Refusal} error=${rotating.error} />
    <div class="dialog-buttons"><button type="button" onClick=${onClose}>Cancel</button><button type="button" class="primary" disabled=${rotating.isBusy} onClick=${rotate}>Rotate</button></div>
  </div></${Dialog}>`;
}

function Made({ made, onClose }) {
  return html`<${Dialog} title=${`The key ${made.name}`} onClose=${onClose}><div class="fields">
    <p>It is shown only now. Copy it before you close this.</p>
    <${Command} text=${made.key} what="the key" />
    <div class="dialog-buttons"><button type="button" class="primary" onClick=${onClose}>Close</button></div>
  </div></${Dialog}>`;
}
