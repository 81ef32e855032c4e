// Reads again every few seconds, while the page is looked at.
import { useEffect, useState } from "./html.js";

const RETRY = "lucid:retry";
const MAX_PAUSE_SECONDS = 15;

export function retryAll() {
  window.dispatchEvent(new Event(RETRY));
}

// Answers {data, error, isLoading}. Data stays while it is read anew, also when `about` changes and when it fails.
export function usePolled(load, seconds, about) {
  const [state, setState] = useState({ data: undefined, error: null, isLoading: true });
  useEffect(() => {
    setState((former) => ({ ...former, isLoading: true }));
    return poll(load, seconds, setState);
  }, about);
  return state;
}

function poll(load, seconds, setState) {
  let timer = 0;
  let failures = 0;
  let controller = null;

  async function run() {
    clearTimeout(timer);
    controller?.abort();
    const mine = (controller = new AbortController());
    try {
      const data = await load(mine.signal);
      if (mine.signal.aborted) return;
      failures = 0;
      setState((former) =>
        former.data === data && !former.error && !former.isLoading ? former : { data, error: null, isLoading: false },
      );
    } catch (error) {
      if (mine.signal.aborted) return;
      failures += 1;
      setState((former) => ({ ...former, error, isLoading: false }));
    }
    const pause = failures ? Math.min(2 ** failures, MAX_PAUSE_SECONDS) : seconds;
    timer = setTimeout(runIfSeen, pause * 1000);
  }

  function runIfSeen() {
    if (!document.hidden) run();
  }

  window.addEventListener(RETRY, run);
  document.addEventListener("visibilitychange", runIfSeen);
  run();
  return () => {
    clearTimeout(timer);
    controller?.abort();
    window.removeEventListener(RETRY, run);
    document.removeEventListener("visibilitychange", runIfSeen);
  };
}
