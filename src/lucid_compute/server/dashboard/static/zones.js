// The time zone that every time on the page is of: the browser's own, or UTC by choice.
import { useEffect, useState } from "./html.js";

const NAME = "lucid.zone";
const CHANGED = "lucid:zone";
const OWN = Intl.DateTimeFormat().resolvedOptions().timeZone;
let zone = OWN;

try {
  if (localStorage.getItem(NAME) === "UTC") zone = "UTC";
} catch {
  // Storage may be switched off: then a choice lasts until the page is loaded anew.
}

export const zoneNow = () => zone;
export const ownZone = OWN;

export function useZone() {
  const [shown, setShown] = useState(zone);
  useEffect(() => {
    const follow = () => setShown(zone);
    window.addEventListener(CHANGED, follow);
    return () => window.removeEventListener(CHANGED, follow);
  }, []);
  return shown;
}

export function chooseZone(chosen) {
  zone = chosen === "UTC" ? "UTC" : OWN;
  try {
    localStorage.setItem(NAME, zone === "UTC" ? "UTC" : "own");
  } catch {
    // As above.
  }
  window.dispatchEvent(new Event(CHANGED));
}
