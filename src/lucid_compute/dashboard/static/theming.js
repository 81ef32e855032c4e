// Dark or light: the system's choice, unless one is made here. It is the one thing that outlives the tab.
import { useEffect, useState } from "./html.js";

const NAME = "lucid.theme";
const CHANGED = "lucid:theme";
const system = matchMedia("(prefers-color-scheme: dark)");

export function themeNow() {
  return document.documentElement.dataset.theme ?? (system.matches ? "dark" : "light");
}

export function useTheme() {
  const [theme, setTheme] = useState(themeNow);
  useEffect(() => {
    const follow = () => setTheme(themeNow());
    system.addEventListener("change", follow);
    window.addEventListener(CHANGED, follow);
    return () => {
      system.removeEventListener("change", follow);
      window.removeEventListener(CHANGED, follow);
    };
  }, []);
  return theme;
}

export function switchTheme() {
  const other = themeNow() === "dark" ? "light" : "dark";
  document.documentElement.dataset.theme = other;
  try {
    localStorage.setItem(NAME, other);
  } catch {
    // Storage may be switched off: then it lasts until the page is loaded anew.
  }
  window.dispatchEvent(new Event(CHANGED));
}
