// Ages that go on between two readings: one clock for all of them, which stands still when none is shown.
import { ago, duration } from "./format.js";
import { useEffect, useMemo, useState } from "./html.js";

const watchers = new Set();
let timer = 0;

function watch(tick) {
  watchers.add(tick);
  timer ||= setInterval(() => document.hidden || watchers.forEach((each) => each(performance.now())), 1000);
  return () => {
    watchers.delete(tick);
    if (watchers.size > 0) return;
    clearInterval(timer);
    timer = 0;
  };
}

// How many seconds old something is that was so old when `of` was read.
function useAge(seconds, of) {
  const readAt = useMemo(() => performance.now(), [of]);
  const [now, setNow] = useState(readAt);
  useEffect(() => watch(setNow), []);
  return seconds === null || seconds === undefined ? null : seconds + Math.max(now - readAt, 0) / 1000;
}

export function Ago({ seconds, of, never = "never" }) {
  const age = useAge(seconds, of);
  return age === null ? never : ago(age < 60 ? Math.floor(age) : age);
}

export function Lasting({ seconds, of }) {
  return duration(useAge(seconds || null, of));
}
