// Logging in with a key: it is tried out before it is kept, and refused with what to do.
import { Api } from "./api.js";
import { html, useEffect, useRef, useState } from "./html.js";

export function Login({ reason, onKey }) {
  const [message, setMessage] = useState(reason);
  const [isBusy, setBusy] = useState(false);
  const [isShown, setShown] = useState(false);
  const [isKept, setKept] = useState(false);
  const field = useRef();
  useEffect(() => {
    document.title = "Log in · Lucid compute";
    field.current.focus();
  }, []);

  async function enter(event) {
    event.preventDefault();
    const key = field.current.value.trim();
    setBusy(true);
    const fault = key ? await faultOf(key) : "Enter a key. An admin makes one with lucid keys create.";
    setBusy(false);
    setMessage(fault);
    if (fault) field.current.focus();
    else onKey(key, isKept);
  }

  return html`<div class="login"><form class="card" onSubmit=${enter} autocomplete="off">
    <h1>Log in</h1>
    <p>Use your API key. A provider sees its own nodes, a consumer the models and its usage, an admin everything.</p>
    <label for="key">Key</label>
    <input id="key" ref=${field} type=${isShown ? "text" : "password"} autocomplete="off" autocapitalize="none" spellcheck=${false}
      placeholder="lk_live_…" aria-invalid=${message ? "true" : undefined} aria-describedby=${message ? "key-fault" : "key-note"} />
    ${message && html`<p class="failure" id="key-fault" role="alert">${message}</p>`}
    <label class="check"><input type="checkbox" checked=${isShown} onChange=${(event) => setShown(event.currentTarget.checked)} /> Show the key</label>
    <label class="check"><input id="keep" type="checkbox" checked=${isKept} onChange=${(event) => setKept(event.currentTarget.checked)} /> Keep the login on this device</label>
    <button type="submit" class="primary" disabled=${isBusy}>${isBusy ? "Trying the key…" : "Log in"}</button>
    <p class="note" id="key-note">${isKept ? "The key stays in this browser until you log out. Do this on a device of your own alone." : "The key stays in this tab and is forgotten when you close it or log out."}</p>
  </form></div>`;
}

// Answers what is wrong with a key; nothing when it will do.
async function faultOf(key) {
  if (!/^[\x21-\x7e]+$/.test(key)) return "A key has no spaces and no special signs. Copy it again, whole.";
  try {
    await new Api(key).get("/me");
    return "";
  } catch (error) {
    if (error.status === 401) return "This key is not valid: it is mistyped, revoked or expired. Check it, or ask for another.";
    return error.isAway ? "The service does not answer. Your key was not tried; try again in a moment." : error.message;
  }
}
