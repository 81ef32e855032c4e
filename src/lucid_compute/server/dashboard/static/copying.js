// Ids and commands with a button that copies them, and lists that are saved.
import { useAction } from "./acting.js";
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

// A list as CSV. It is fetched with the key and then saved, because a link can't carry one.
export function SaveCsv({ api, path, asked, name }) {
  const saving = useAction(async () => {
    const text = await api.text(path, { ...asked, format: "csv" });
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([text], { type: "text/csv" }));
    link.download = `${name}.csv`;
    link.click();
    URL.revokeObjectURL(link.href);
  });
  return html`<span>${saving.error && html`<span role="alert" class="tone-bad">${saving.error.message} </span>`}<button type="button" disabled=${saving.isBusy} onClick=${saving.start}>Save as CSV</button></span>`;
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
