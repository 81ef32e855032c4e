// Runs before the page's modules are there: what the view will ask first is asked meanwhile, and handed over by `api.js`.
(() => {
  const KEPT_MS = 5000;
  const TIMEOUT_MS = 15_000; // as of every request: else a view would wait for ever for a service that hangs
  const root = document.documentElement.dataset.root;
  const [, , section, ...rest] = location.pathname.slice(root.length).split("/");
  const addresses = ["/me"];
  if (section === "models" && rest.length === 1 && !location.search) {
    addresses.push(`/models/${rest[0]}`, `/models/${rest[0]}/availability?page=1&perPage=50`); // encoded as the view does it
  }
  const nodes = ["/compute/overview"]; // what not every key may read
  if (section === "nodes" && rest.length === 0 && !location.search) {
    nodes.push("/compute?page=1&perPage=50&sortBy=severity&sortOrder=desc");
  }
  try {
    const key = sessionStorage.getItem("lucid.key") ?? localStorage.getItem("lucid.key");
    if (!sessionStorage.getItem("lucid.narrow")) addresses.push(...nodes);
    if (key) window.lucidEarly = { key, asked: new Map(addresses.map((address) => [address, ask(address, key)])) };
    setTimeout(() => delete window.lucidEarly, KEPT_MS);
  } catch {
    // Storage may be switched off: then the views ask for themselves.
  }

  function ask(address, key) {
    const headers = { Authorization: `Bearer ${key}`, Accept: "application/json" };
    const answer = fetch(root + address, { headers, cache: "no-store", credentials: "omit", signal: AbortSignal.timeout(TIMEOUT_MS) });
    answer.catch(() => {}); // whoever takes it over hears of it
    return answer;
  }
})();
