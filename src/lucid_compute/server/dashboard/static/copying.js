// Ids and commands, with a button that copies them.
import { html, useEffect, useState } from "./html.js";

const SAID_MS = 2000;

export function Copy({ text, what }) {
  const [said, setSaid] = useState("");
  useEffect(() => {
    if (!said) return undefined;
    const timer = setTimeout(() => setSaid(""), SAID_MS);
    return () => clearTimeout(timer);
  }, [said]);
  const copy = async () => setSaid((await isCopied(text)) ? "Copied" : "Select it, and copy it by hand");
  return html`<span class="copy">
    <button type="button" class="quiet" onClick=${copy} aria-label=${`Copy ${what}`} title=${`Copy ${what}`}>
      <svg viewBox="0 0 16 16" width="14" height="14" aria-hidden="true"><path d="M5 5V2.5h8.5V11H11M2.5 5H11v8.5H2.5z" fill="none" stroke="currentColor" stroke-width="1.4" stroke-linejoin="round" /></svg>
    </button>
    <span class="copied" role="status">${said}</span>
  </span>`;
}

// A command as it is typed; long ones scroll.
export function Command({ text, what = "the command" }) {
  return html`<div class="command"><pre tabindex="0"><code>${text}</code></pre><${Copy} text=${text} what=${what} /></div>`;
}

// The clipboard is there for pages over TLS and of one's own machine; elsewhere a selection has to do.
async function isCopied(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    return isCopiedBySelection(text);
  }
}

function isCopiedBySelection(text) {
  const before = document.activeElement;
  const field = document.createElement("textarea");
  field.value = text;
  field.className = "hidden";
  document.body.append(field);
  field.select();
  try {
    return document.execCommand("copy");
  } catch {
    return false;
  } finally {
    field.remove();
    before?.focus({ preventScroll: true });
  }
}
