// Doing something to the service: dialogs, fields, and buttons that say what came of it.
import { html, useEffect, useRef, useState } from "./html.js";
import { retryAll } from "./polling.js";

const IDLE = { isBusy: false, error: null, result: undefined };

// Return {isBusy, error, result, start, reset}; `start` runs the action, and returns undefined when it is refused.
export function useAction(run) {
  const [state, setState] = useState(IDLE);
  const start = async (...given) => {
    setState({ ...IDLE, isBusy: true });
    try {
      const result = (await run(...given)) ?? true;
      setState({ ...IDLE, result });
      return result;
    } catch (error) {
      setState({ ...IDLE, error });
      return undefined;
    }
  };
  return { ...state, start, reset: () => setState(IDLE) };
}

// A refusal in the service's own words, and what it says of fields that stand nowhere else.
export function Refusal({ error, except = [] }) {
  if (!error) return null;
  const others = error.fields.filter(({ path }) => !except.some((name) => isAt(path, name)));
  return html`<div class="failure" role="alert">
    <p>${error.message}</p>
    ${others.length > 0 && html`<ul>${others.map(({ path, message }) => html`<li key=${path}><code>${path}</code> ${message}</li>`)}</ul>`}
  </div>`;
}

const isAt = (path, name) => path === name || path?.endsWith(`.${name}`);

// What was typed as a number, if it is one; else as it was typed, so that the service refuses it in its own words.
export const typedNumber = (text) => (/^\d+(\.\d+)?$/.test(text) ? Number(text) : text);

// A dialog above the page: Escape closes it, and the focus returns to where it was.
export function Dialog({ title, onClose, wide = false, children }) {
  const dialog = useRef();
  useEffect(() => {
    const element = dialog.current;
    element.showModal();
    return () => element.close();
  }, []);
  const cancel = (event) => {
    event.preventDefault();
    onClose();
  };
  return html`<dialog ref=${dialog} class=${wide ? "wide" : ""} aria-labelledby="dialog-title" onCancel=${cancel}>
    <div class="dialog-head"><h2 id="dialog-title" tabindex="-1">${title}</h2><button type="button" class="quiet" aria-label="Close" onClick=${onClose}>✕</button></div>
    ${children}
  </dialog>`;
}

// A field of a form with its label, a hint, and what the service says of it. `name` is the field's path in the request.
export function Field({ name, label, hint, error, options, onInput, ...rest }) {
  const fault = error?.fields.find(({ path }) => isAt(path, name))?.message;
  const id = `field-${name.replaceAll(".", "-")}`;
  const about = fault || hint ? `${id}-note` : undefined;
  const change = (event) => onInput(event.currentTarget.value);
  return html`<div class="field">
    <label for=${id}>${label}</label>
    ${options
      ? html`<select id=${id} aria-describedby=${about} onChange=${change} ...${rest}>${options.map(([value, text]) => html`<option value=${value} key=${value}>${text}</option>`)}</select>`
      : html`<input id=${id} aria-describedby=${about} aria-invalid=${fault ? "true" : undefined} autocomplete="off" spellcheck=${false} onInput=${change} ...${rest} />`}
    ${about && html`<span id=${about} class=${fault ? "fault" : "note"}>${fault ?? hint}</span>`}
  </div>`;
}

// Several of a few.
export function Checks({ label, options, chosen, onChange }) {
  const toggle = (value) => onChange(chosen.includes(value) ? chosen.filter((each) => each !== value) : [...chosen, value]);
  return html`<fieldset class="checks"><legend>${label}</legend>${options.map(([value, text]) => html`<label class="check" key=${value}>
    <input type="checkbox" checked=${chosen.includes(value)} onChange=${() => toggle(value)} /> <span><strong>${value}</strong> <span class="note">${text}</span></span>
  </label>`)}</fieldset>`;
}

// What was just done, for as long as it can be undone here.
export function Undo({ text, run, onEnd }) {
  const undoing = useAction(run);
  const undo = async () => {
    if ((await undoing.start()) === undefined) return;
    retryAll();
    onEnd();
  };
  return html`<div class="undo" role="status"><span>${text}</span> <button type="button" disabled=${undoing.isBusy} onClick=${undo}>Undo</button> <button type="button" class="quiet" aria-label="Keep it so" onClick=${onEnd}>✕</button><${Refusal} error=${undoing.error} /></div>`;
}

// A dialog that asks before something is done. With `word` it is final: the word has to be typed.
export function Confirm({ title, action, word = "", run, onClose, onDone, children }) {
  const [typed, setTyped] = useState("");
  const doing = useAction(run);
  const submit = async (event) => {
    event.preventDefault();
    const result = await doing.start();
    if (result === undefined) return;
    onDone?.(result);
    onClose();
  };
  return html`<${Dialog} title=${title} onClose=${onClose}>
    <form onSubmit=${submit}>
      ${children}
      ${word && html`<${Field} name="word" label=${html`To confirm, type <strong>${word}</strong>`} value=${typed} onInput=${setTyped} autofocus />`}
      <${Refusal} error=${doing.error} />
      <div class="dialog-buttons">
        <button type="button" onClick=${onClose}>Cancel</button>
        <button type="submit" class=${word ? "danger" : "primary"} autofocus=${!word} disabled=${doing.isBusy || (word !== "" && typed !== word)}>${doing.isBusy ? "…" : action}</button>
      </div>
    </form>
  </${Dialog}>`;
}
