// Runs before the first paint: the theme that was chosen here before, else the system's.
(() => {
  const root = document.documentElement;
  let chosen = null;
  try {
    chosen = localStorage.getItem("lucid.theme");
  } catch {
    // Storage may be switched off: then the system's theme it is.
  }
  if (chosen === "dark" || chosen === "light") root.dataset.theme = chosen;
})();
