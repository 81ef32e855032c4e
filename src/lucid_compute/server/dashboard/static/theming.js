// Dark or light: the system's choice, unless one is made here. It is the one thing that outlives the tab.
import { useEffect, useState } from "./html.js";

const NAME = "lucid.theme";
const CHANGED = "lucid:theme";
const system = matchMedia("(prefers-color-scheme: dark)");
let isChosen = false;

try {
  isChosen = localStorage.getItem(NAME) !== null;
} catch {
  // Storage may be switched off: then a choice lasts until the page is loaded anew.
}

system.addEventListener("change", () => {
  if (!isChosen) show(system.matches ? "dark" : "light");
});

function show(theme) {
  document.documentElement.dataset.theme = theme;
  window.dispatchEvent(new Event(CHANGED));
}

const themeNow = () => document.documentElement.dataset.theme;

export function useTheme() {
  const [theme, setTheme] = useState(themeNow);
  useEffect(() => {
    const follow = () => setTheme(themeNow());
    window.addEventListener(CHANGED, follow);
    return () => window.removeEventListener(CHANGED, follow);
  }, []);
  return theme;
}

export function switchTheme() {
  const other = themeNow() === "dark" ? "light" : "dark";
  isChosen = true;
  try {
    localStorage.setItem(NAME, other);
  } catch {
    // As above.
  }
  show(other);
}
