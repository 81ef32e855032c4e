// Finding anything and doing anything by its name: Ctrl or ⌘ and K.
import { Dialog } from "./acting.js";
import { html, useEffect, useState } from "./html.js";
import { usePolled } from "./polling.js";
import { addressOf, go } from "./router.js";

const TYPING_MS = 150;
const EACH = 5;
const ID = /^[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f-]{22}$/i;
const VERBS = [["drain", "Drain"], ["resume", "Resume"], ["deregister", "Deregister"]];

// `pages` are [name, address]; actions lead to the place where they are confirmed.
export function Palette({ api, pages, mayRead, isAdmin, onClose }) {
  const [text, setText] = useState("");
  const [asked, setAsked] = useState("");
  const [at, setAt] = useState(0);
  useEffect(() => {
    const timer = setTimeout(() => setAsked(text.trim()), TYPING_MS);
    return () => clearTimeout(timer);
  }, [text]);
  const found = usePolled((signal) => find(api, asked, { mayRead, isAdmin }, signal), 60, [api, asked]);
  const needle = text.trim().toLowerCase();
  const fixed = [
    ...pages.map(([name, path]) => ({ kind: "page", name, address: addressOf(path) })),
    ...(mayRead ? [{ kind: "action", name: "Add a node", address: addressOf("/nodes", { add: "node" }) }] : []),
    ...(mayRead ? [{ kind: "action", name: "Register a model", address: addressOf("/models", { add: "model" }) }] : []),
    ...(isAdmin ? [{ kind: "action", name: "Make a key", address: addressOf("/keys", { add: "key" }) }] : []),
    ...(ID.test(needle) ? [{ kind: "job", name: needle, address: addressOf(`/jobs/${needle}`) }] : []),
  ].filter(({ name }) => name.toLowerCase().includes(needle));
  const items = [...fixed.slice(0, needle ? EACH : fixed.length), ...(needle ? (found.data ?? []) : [])];
  const place = Math.min(at, items.length - 1);
  const open = (item) => {
    if (!item) return;
    onClose();
    go(item.address);
  };
  const press = (event) => {
    const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (event.key === "Enter") open(items[place]);
    if (!step) return;
    event.preventDefault();
    setAt((Math.max(place, 0) + step + items.length) % items.length);
  };
  return html`<${Dialog} title="Find or do" onClose=${onClose}>
    <input role="combobox" aria-label="Name of a node, model, key, page or action, or a job's id" aria-expanded="true" aria-controls="found" aria-activedescendant=${items[place] ? `found-${place}` : undefined}
      placeholder="berlin-1, my-model, drain berlin-1, payouts …" autocomplete="off" spellcheck=${false} autofocus value=${text}
      onInput=${(event) => { setText(event.currentTarget.value); setAt(0); }} onKeyDown=${press} />
    <div role="listbox" id="found" class="found" aria-label="Found">${items.map((item, number) => html`<div role="option" id=${`found-${number}`} key=${item.address} aria-selected=${number === place} onClick=${() => open(item)}><span>${item.name}</span> <span class="note">${item.kind}</span></div>`)}</div>
    ${items.length === 0 && html`<p class="note" role="status">${found.isLoading ? "Searching…" : "Nothing has this name."}</p>`}
  </${Dialog}>`;
}

// Return what has such a name: nodes with what can be done to them, models, and keys.
async function find(api, text, { mayRead, isAdmin }, signal) {
  if (!text) return [];
  const [verb, name] = VERBS.find(([word]) => text.toLowerCase().startsWith(`${word} `)) ?? [];
  const search = verb ? text.slice(verb.length).trim() : text;
  const [nodes, models, keys] = await Promise.all([
    mayRead ? api.get("/compute", { search, perPage: EACH }, signal).then((data) => data.nodes, () => []) : [],
    verb ? [] : api.get("/models", { search, perPage: EACH }, signal).then((data) => data.models, () => []),
    verb || !isAdmin ? [] : api.get("/keys", { perPage: 100 }, signal).then((data) => data.keys, () => []),
  ]);
  return [
    ...nodes.map((node) => (verb ? { kind: "action", name: `${name} ${node.name}`, address: addressOf(`/nodes/${node.id}`, { do: verb }) } : { kind: "node", name: node.name, address: addressOf(`/nodes/${node.id}`) })),
    ...models.map((model) => ({ kind: "model", name: model.name, address: addressOf(`/models/${encodeURIComponent(model.name)}`) })),
    ...keys.filter((key) => key.name.toLowerCase().includes(search.toLowerCase())).slice(0, EACH).map((key) => ({ kind: "key", name: key.name, address: addressOf("/keys", { owner: key.owner }) })),
  ];
}
