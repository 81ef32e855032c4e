// Runs before the first paint: the theme that was chosen here before, else the system's.
(() => {
  let chosen = null;
  try {
    chosen = localStorage.getItem("lucid.theme");
  } catch {
    // Storage may be switched off: then the system's theme it is.
  }
  const system = matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
  document.documentElement.dataset.theme = chosen === "dark" || chosen === "light" ? chosen : system;
})();
