// Who is logged in and what the key may do, the service's state and version, and how the page looks.
import { count, duration, moment } from "./format.js";
import { Fragment, html, useState } from "./html.js";
import { Card, Choice, Empty, Heading, Shown, Table } from "./parts.js";
import { usePolled } from "./polling.js";
import { limitsOf } from "./keys.js";
import { ROOT, addressOf } from "./router.js";
import { switchTheme, useTheme } from "./theming.js";
import { chooseZone, ownZone, useZone } from "./zones.js";

const SLOW_SECONDS = 60;
const SECONDS = 5;

export function SettingsView({ api, who, overview, isAdmin }) {
  const ready = usePolled((signal) => api.get("/readyz", {}, signal), SECONDS, [api]);
  const version = usePolled(async (signal) => (await api.get("/openapi.json", {}, signal)).info.version, SLOW_SECONDS * 60, [api]);
  const outages = overview.data?.outages.length;
  return html`<${Fragment}>
    <${Heading} title="Settings" />
    <${Card} title="Who you are">
      <${Shown} of=${who} lines=${2}>${(me) => html`<${Facts} facts=${[
        ["Owner", me.scopes.includes("admin") ? `${me.owner}, who sees all owners` : me.owner], ["Key", `${me.name}, …${me.lastFour}`], ["It may", me.scopes.join(", ")],
        ["Ends", me.expiresAt ? moment(me.expiresAt) : "never"], ["Made", moment(me.createdAt)], ["Secret of", me.rotatedAt && moment(me.rotatedAt)], ["Only for the node", me.passportId && html`<a href=${addressOf(`/nodes/${me.passportId}`)}>${me.passportId}</a>`],
        ["Limits", limitsOf(me.limits)],
      ]} />`}</${Shown}>
    </${Card}>
    <${Card} title="The service">
      <${Shown} of=${ready} lines=${2}>${(state) => html`<${Facts} facts=${[
        ["State", state.status], ["Version", version.data ?? "–"], ["Replicas alive", count(overview.data?.replicas ?? state.replicas)], ["Nodes", count(state.nodes)], ["Models", count(state.models)],
        ["Its view of the fleet is", `${duration(state.feedAgeSeconds)} old`], ["Runs on", `Python ${state.python}, ${state.compiled ? "compiled" : "interpreted"}`],
        ["Outages of its own", outages === undefined ? null : outages === 0 ? "none known" : html`<a href=${addressOf("/")}>${count(outages)}</a>`],
      ]} />`}</${Shown}>
      <p class="note">${!isAdmin && html`<${Fragment}>Settings of the service are variables: <code>lucid settings</code> lists them. </${Fragment}>`}<a href=${`${ROOT}/docs`}>The API reference</a></p>
    </${Card}>
    ${isAdmin && html`<${Service} api=${api} />`}
    <${Looks} />
  </${Fragment}>`;
}

// What an operator wants to know of it: the replicas, and how the one that responds is set up.
function Service({ api }) {
  const [isAll, setAll] = useState(false);
  const service = usePolled((signal) => api.get("/service", {}, signal), SECONDS * 2, [api]);
  return html`<${Fragment}>
    <${Card} title="Replicas" aside=${html`<span class="note">each worker is one</span>`}>
      <${Shown} of=${service} lines=${2}>${({ replicas }) => html`<${Table} caption="Replicas" columns=${REPLICAS} rows=${replicas} keyOf=${(one) => one.id} />`}</${Shown}>
    </${Card}>
    <${Card} title="Settings of the service" aside=${html`<${Choice} label="Settings" options=${[["set", "changed"], ["all", "all"]]} value=${isAll ? "all" : "set"} onChange=${(chosen) => setAll(chosen === "all")} />`}>
      <${Shown} of=${service} lines=${4}>${({ settings }) => html`<${Table} caption="Settings" className="settings" columns=${SETTINGS} rows=${settings.filter((one) => isAll || !one.isDefault)} keyOf=${(one) => one.variable} empty=${html`<${Empty} title="All settings have their defaults." />`} />`}</${Shown}>
      <p class="note">They are read from the environment when the service starts.</p>
    </${Card}>
  </${Fragment}>`;
}

const REPLICAS = [
  ["Replica", (one) => html`<code>${one.id.slice(0, 8)}</code>${one.answers && html` <span class="note">responds to this page</span>`}`],
  ["Started", (one) => moment(one.startedAt)],
  ["Seen", (one) => moment(one.seenAt)],
  ["In flight", (one) => count(one.inFlight), "right"],
];
const SETTINGS = [
  ["Variable", (one) => html`<code>${one.variable}</code>`],
  ["Value", (one) => html`<code>${one.value ?? "unset"}</code>`],
  ["Meaning", (one) => one.meaning],
];

function Facts({ facts }) {
  return html`<dl class="facts">${facts.filter(([, value]) => value !== null && value !== undefined).map(([label, value]) => html`<div key=${label}><dt>${label}</dt><dd>${value}</dd></div>`)}</dl>`;
}

function Looks() {
  const theme = useTheme();
  const zone = useZone();
  return html`<${Card} title="How it looks here">
    <div class="filters">
      <div class="field"><span class="note">Colours</span><${Choice} label="Colours" options=${[["light", "light"], ["dark", "dark"]]} value=${theme} onChange=${(chosen) => chosen !== theme && switchTheme()} /></div>
      <div class="field"><span class="note">Times</span><${Choice} label="Times" options=${ownZone === "UTC" ? [["UTC", "UTC"]] : [[ownZone, ownZone], ["UTC", "UTC"]]} value=${zone} onChange=${chooseZone} /></div>
    </div>
  </${Card}>`;
}
