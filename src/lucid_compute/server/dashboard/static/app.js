// The page: who is logged in, what is shown, and whether the service answers.
import { AddNode } from "./add_node.js";
import { Api } from "./api.js";
import { AuditView } from "./audit.js";
import { EventsView } from "./events.js";
import { FleetView } from "./fleet.js";
import { Finder } from "./finding.js";
import { Fragment, html, render, useEffect, useMemo, useRef, useState } from "./html.js";
import { JobsView, JobView } from "./job_list.js";
import { KeysView } from "./keys.js";
import { Login } from "./login.js";
import { ModelView } from "./model.js";
import { ModelsView } from "./models.js";
import { NodeView } from "./node.js";
import { NodesView } from "./nodes.js";
import { Empty, Heading, Loading } from "./parts.js";
import { moment } from "./format.js";
import { Palette } from "./palette.js";
import { PayoutsView } from "./payouts.js";
import { PlaygroundView } from "./playground.js";
import { retryAll, usePolled } from "./polling.js";
import { addressOf, changeQuery, go, usePlace } from "./router.js";
import { forgetKey, keepKey, keepWhetherItReads, readKey } from "./session.js";
import { SettingsView } from "./settings.js";
import { switchTheme, useTheme } from "./theming.js";
import { UsageView } from "./usage.js";
import { WebhooksView } from "./webhooks.js";
import { chooseZone, ownZone, useZone } from "./zones.js";

const LIVE_SECONDS = 3;
const WHO_SECONDS = 60;
const SOON_MS = 7 * 86_400_000;
const READ = ["passports:read", "compute"];
const RUN = ["inference:run"];
// Each with the scopes that may read it, beside admin; those of everybody have none.
const SECTIONS = [
  ["Fleet", "/", READ], ["Nodes", "/nodes", READ], ["Models", "/models"], ["Playground", "/playground", RUN], ["Jobs", "/jobs", [...READ, ...RUN]], ["Events", "/events", READ],
  ["Usage", "/usage", RUN], ["Payouts", "/payouts", READ], ["Webhooks", "/webhooks", ["compute"]], ["Keys", "/keys", []], ["Audit", "/audit", []], ["Settings", "/settings"],
];

// Whether a key has one of the scopes; one that is not known may have any.
const may = (me, scopes) => !scopes || !me || me.scopes.some((scope) => scope === "admin" || scopes.includes(scope));

function App() {
  const place = usePlace();
  const [key, setKey] = useState(readKey);
  const [reason, setReason] = useState("");
  const logOut = (why = "") => {
    forgetKey();
    setReason(why);
    setKey(null);
  };
  const logIn = (entered, isForDevice) => {
    keepKey(entered, isForDevice);
    setReason("");
    setKey(entered);
  };
  if (!key) return html`<${Frame} place=${place}><${Login} reason=${reason} onKey=${logIn} /></${Frame}>`;
  return html`<${LoggedIn} key=${key} apiKey=${key} place=${place} onLeave=${logOut} />`;
}

function LoggedIn({ apiKey, place, onLeave }) {
  const api = useMemo(() => new Api(apiKey, {
    onRefused: () => onLeave("This key is no longer valid: it was revoked, or it expired. Log in with another."),
  }), [apiKey]);
  const who = usePolled((signal) => api.get("/me", {}, signal), WHO_SECONDS, [api]);
  if (!who.data && !who.error) return html`<${Frame} place=${place} onLeave=${() => onLeave()}><${Loading} /></${Frame}>`;
  return html`<${Session} api=${api} who=${who} place=${place} onLeave=${onLeave} />`;
}

// What a key sees; one whose scopes can't be read at the moment is shown every section.
function Session({ api, who, place, onLeave }) {
  const me = who.data;
  const mayRead = may(me, READ);
  useEffect(() => keepWhetherItReads(mayRead), [mayRead]);
  const live = usePolled((signal) => api.get(mayRead ? "/compute/overview" : "/readyz", {}, signal), LIVE_SECONDS, [api, mayRead]);
  const overview = mayRead ? live : { data: undefined, error: null, isLoading: false };
  const owner = overview.data?.owner ?? (me && (may(me, []) ? null : me.owner));
  const sections = SECTIONS.filter(([, , scopes]) => may(me, scopes));
  useEffect(() => {
    if (!mayRead && place.path === "/") go(addressOf("/models"), { replace: true }); // a consumer begins with what it can call
  }, [mayRead, place.path]);
  const [isFinding, setFinding] = useState(false);
  useEffect(() => {
    const press = (event) => {
      if (event.key.toLowerCase() !== "k" || !(event.ctrlKey || event.metaKey) || event.altKey || event.shiftKey) return;
      event.preventDefault();
      if (!document.querySelector("dialog[open]")) setFinding(true);
    };
    document.addEventListener("keydown", press);
    return () => document.removeEventListener("keydown", press);
  }, []);
  const away = live.error?.isAway ? live.error : null;
  const wasAway = useRef(false);
  useEffect(() => {
    if (wasAway.current && !away) retryAll(); // what failed meanwhile need not wait for its turn
    wasAway.current = Boolean(away);
  }, [away]);
  return html`<${Frame} place=${place} sections=${sections} mayRead=${mayRead} away=${away} owner=${owner} me=${me} onLeave=${() => onLeave()} onPalette=${() => setFinding(true)}>
    ${viewOf(place, { api, who, owner, overview, mayRead, mayRun: may(me, RUN) })}
    ${isFinding && html`<${Palette} api=${api} pages=${sections} mayRead=${mayRead} isAdmin=${owner === null} onClose=${() => setFinding(false)} />`}
    ${owner !== undefined && place.query.add === "node" && html`<${AddNode} api=${api} apiKey=${api.key} owner=${owner} onClose=${() => changeQuery({ add: "" })} />`}
  </${Frame}>`;
}

function viewOf({ path, query }, { api, who, owner, overview, mayRead, mayRun }) {
  const [, section, ...rest] = path.split("/");
  const id = rest.map(decoded).join("/");
  if (/^\.{1,2}$/.test(id)) return html`<${Nowhere} />`; // an address of the API that it ends would be another one
  if (!section) return mayRead && html`<${FleetView} api=${api} query=${query} overview=${overview} />`;
  if (section === "nodes") return id ? html`<${NodeView} key=${id} id=${id} api=${api} query=${query} />` : html`<${NodesView} api=${api} query=${query} owner=${owner} />`;
  if (section === "models") return id ? html`<${ModelView} key=${id} id=${id} api=${api} query=${query} mayRead=${mayRead} mayRun=${mayRun} />` : html`<${ModelsView} api=${api} query=${query} mayRead=${mayRead} />`;
  if (section === "payouts" && !id) return html`<${PayoutsView} api=${api} query=${query} owner=${owner} />`;
  if (section === "playground" && !id) return html`<${PlaygroundView} api=${api} query=${query} />`;
  if (section === "jobs") return id ? html`<${JobView} key=${id} id=${id} api=${api} />` : html`<${JobsView} api=${api} query=${query} isAdmin=${owner === null} />`;
  if (section === "events" && !id) return html`<${EventsView} api=${api} query=${query} isAdmin=${owner === null} />`;
  if (section === "usage" && !id) return html`<${UsageView} api=${api} query=${query} isAdmin=${owner === null} />`;
  if (section === "webhooks" && !id) return html`<${WebhooksView} api=${api} query=${query} isAdmin=${owner === null} />`;
  if (section === "audit" && !id) return html`<${AuditView} api=${api} query=${query} />`;
  if (section === "settings" && !id) return html`<${SettingsView} api=${api} who=${who} overview=${overview} isAdmin=${owner === null} />`;
  if (section === "keys" && !id) return html`<${KeysView} api=${api} query=${query} />`;
  return html`<${Nowhere} />`;
}

function Nowhere() {
  return html`<${Fragment}><${Heading} title="There is no such page" /><${Empty} title="Nothing is kept under this address."><a href=${addressOf("/")}>Go to the fleet</a></${Empty}></${Fragment}>`;
}

// An address may be cut in the middle of an encoded sign: then it is taken as it stands.
function decoded(part) {
  try {
    return decodeURIComponent(part);
  } catch {
    return part;
  }
}

function Frame({ place, sections = [], mayRead, away = null, owner, me, onLeave, onPalette, children }) {
  const theme = useTheme();
  const zone = useZone();
  const main = useRef();
  const other = theme === "dark" ? "light" : "dark";
  return html`<${Fragment}>
    <a class="skip" href="#main" onClick=${(event) => { event.preventDefault(); main.current.focus(); }}>Skip to the content</a>
    <header class="top">
      <a class="brand" href=${addressOf("/")}><${Sign} />Lucid<span> compute</span></a>
      <div class="top-end">
        ${onPalette && html`<${Finder} onPalette=${onPalette} hasNodes=${mayRead} />`}
        ${onPalette && html`<span class=${`live ${away ? "live-off" : ""}`} role="status"><span class="dot" aria-hidden="true"></span>${away ? "reconnecting" : "live"}</span>`}
        ${onLeave && owner !== undefined && html`<${Who} owner=${owner} me=${me} />`}
        ${ownZone !== "UTC" && html`<button type="button" class="quiet" onClick=${() => chooseZone(zone === "UTC" ? ownZone : "UTC")} title=${`Times are in ${zone}`}>${zone === "UTC" ? "UTC" : "local time"}</button>`}
        <button type="button" class="quiet" onClick=${switchTheme} aria-label=${`Switch to ${other} colours`} title=${`Switch to ${other} colours`}>${theme === "dark" ? "☀" : "☾"}</button>
        ${onLeave && html`<button type="button" class="quiet" onClick=${onLeave}>Log out</button>`}
      </div>
    </header>
    ${away && html`<div class="banner" role="alert"><p><strong>${away.isUnreachable ? "The service does not answer." : "The service can't answer at the moment."}</strong> ${away.isUnreachable ? "" : away.message} What you see is what was last known; it is asked again by itself.</p><button type="button" onClick=${retryAll}>Try now</button></div>`}
    <div class=${onLeave ? "layout" : ""}>
      ${onLeave && html`<${Sections} path=${place.path} sections=${sections} />`}
      <main id="main" ref=${main} tabindex="-1">${children}</main>
    </div>
  </${Fragment}>`;
}

// Whose things are shown, by which key, and until when if that is soon.
function Who({ owner, me }) {
  const isEnding = me?.expiresAt && Date.parse(me.expiresAt) - Date.now() < SOON_MS;
  return html`<a class="who" href=${addressOf("/settings")} title=${me ? `Key ${me.name}: ${me.scopes.join(", ")}` : "Whose nodes are shown, and what the key may do"}>${owner ?? "all owners"}${me && html` · ${me.name}`}${isEnding && html` <span class="tone-warn">ends ${moment(me.expiresAt)}</span>`}</a>`;
}

function Sections({ path, sections }) {
  const section = `/${path.split("/")[1]}`;
  return html`<nav class="sections" aria-label="Sections">
    ${sections.map(([text, to]) => html`<a href=${addressOf(to)} aria-current=${section === to ? "page" : undefined} key=${to}>${text}</a>`)}
  </nav>`;
}

function Sign() {
  return html`<svg viewBox="0 0 32 32" width="26" height="26" aria-hidden="true"><rect width="32" height="32" rx="8" fill="var(--accent)" /><path d="M9 7v15a3 3 0 0 0 3 3h11" fill="none" stroke="#fff" stroke-width="4" stroke-linecap="round" stroke-linejoin="round" /><circle cx="22" cy="11" r="4" fill="#34d399" /></svg>`;
}

// A page that the browser kept and brings back still holds the key that it had; whether it is logged in is read anew.
window.addEventListener("pageshow", (event) => event.persisted && location.reload());

render(html`<${App} />`, document.getElementById("app"));
