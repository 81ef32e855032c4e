// Addresses of the page: what is shown stands in the path, how it is shown in the query. No key is ever in it.
import { useEffect, useState } from "./html.js";

export const ROOT = document.documentElement.dataset.root; // the sub-path that a proxy offers the service at
export const BASE = `${ROOT}/dashboard`;
const MOVED = "lucid:moved";

export function addressOf(path, query = {}) {
  const given = Object.entries(query).filter(([, value]) => value !== "" && value !== null && value !== undefined);
  const text = new URLSearchParams(given).toString();
  return `${BASE}${path === "/" ? "" : path}${text ? `?${text}` : ""}`;
}

// Shows another address; `replace` leaves no step to go back to.
export function go(address, { replace = false } = {}) {
  history[replace ? "replaceState" : "pushState"](null, "", address);
  window.dispatchEvent(new Event(MOVED));
}

// Changes part of the query of the address at hand.
export function changeQuery(change, options = { replace: true }) {
  const { path, query } = readPlace();
  go(addressOf(path, { ...query, ...change }), options);
}

export function usePlace() {
  const [place, setPlace] = useState(readPlace);
  useEffect(() => {
    const follow = () => setPlace(readPlace());
    window.addEventListener("popstate", follow);
    window.addEventListener(MOVED, follow);
    document.addEventListener("click", followLink);
    return () => {
      window.removeEventListener("popstate", follow);
      window.removeEventListener(MOVED, follow);
      document.removeEventListener("click", followLink);
    };
  }, []);
  return place;
}

function readPlace() {
  const path = location.pathname.slice(BASE.length).replace(/\/+$/, "") || "/";
  return { path, query: Object.fromEntries(new URLSearchParams(location.search)) };
}

function followLink(event) {
  if (event.defaultPrevented || event.button !== 0 || event.metaKey || event.ctrlKey || event.shiftKey || event.altKey) return;
  const link = event.target.closest?.("a[href]");
  if (!link || link.target || link.origin !== location.origin || !isOurs(link.pathname)) return;
  event.preventDefault();
  go(link.pathname + link.search);
  window.scrollTo(0, 0);
}

function isOurs(pathname) {
  return pathname === BASE || pathname.startsWith(`${BASE}/`);
}
