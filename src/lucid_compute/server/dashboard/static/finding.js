// Finding a node by its name or id from anywhere: in the head of the page, and by the key "/".
import { html, useEffect, useRef } from "./html.js";
import { addressOf, go } from "./router.js";

const NODES = "/nodes";

export function Finder({ onPalette, hasNodes }) {
  const field = useRef();
  useEffect(() => {
    document.addEventListener("keydown", follow);
    return () => document.removeEventListener("keydown", follow);
  }, []);
  const find = (event) => {
    event.preventDefault();
    const search = field.current.value.trim();
    field.current.value = "";
    go(addressOf(NODES, { search }));
  };
  return html`<form class="finder" role="search" aria-label="Find a node" onSubmit=${find}>
    <button type="button" class="quiet" onClick=${onPalette} aria-keyshortcuts="Control+K Meta+K" title="Find or do anything (Ctrl K)"><svg viewBox="0 0 16 16" width="16" height="16" aria-hidden="true"><path d="M7 2.5a4.5 4.5 0 1 1 0 9 4.5 4.5 0 0 1 0-9zM10.5 10.5 14 14" fill="none" stroke="currentColor" stroke-width="1.6" stroke-linecap="round" /></svg><span class="hidden">Find or do</span></button>
    ${hasNodes && html`<input id="find" ref=${field} type="search" placeholder="Find a node  ( / )" aria-label="Name or id of a node" aria-keyshortcuts="/" autocomplete="off" spellcheck=${false} />`}
  </form>`;
}

function follow(event) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === "/" && !isTyping(event.target)) {
    event.preventDefault();
    // The list of nodes is searched in place; fields of other lists find no nodes.
    const fields = location.pathname === addressOf(NODES) ? ["#filter-search", "#find"] : ["#find"];
    const field = fields.map((name) => document.querySelector(name)).find((found) => found?.checkVisibility());
    if (field) field.focus();
    else document.querySelector(".finder button")?.click();
  }
  if (event.key === "Escape" && event.target.type === "search") {
    if (event.target.value === "") event.target.blur(); // else the browser empties it
  }
}

function isTyping(element) {
  return element.isContentEditable || ["INPUT", "TEXTAREA", "SELECT"].includes(element.tagName);
}
