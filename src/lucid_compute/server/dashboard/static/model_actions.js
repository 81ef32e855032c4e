// Models are registered, changed and ended here: what they need of a node, their aliases, and where their requests go.
import { Confirm, Dialog, Field, Refusal, Undo, typedNumber, useAction } from "./acting.js";
import { Fragment, html, useState } from "./html.js";
import { retryAll } from "./polling.js";
import { addressOf, changeQuery, go } from "./router.js";

const FORMATS = [["safetensors", "safetensors"], ["gguf", "gguf"]];
const NEW = { name: "", format: "safetensors", minVramGb: "", contextLength: "", runtimes: "", aliases: "", weights: "", fallbacks: "" };
const LISTS = ["runtimes", "aliases", "fallbacks"];

// The buttons of a model's page.
export function ModelActions({ api, model, asked = "" }) {
  const [open, setOpen] = useState(asked);
  const [undo, setUndo] = useState(null); // {text, run} of the last change
  const close = () => {
    setOpen("");
    changeQuery({ do: "" });
  };
  return html`<div class="actions" role="group" aria-label="Actions">
    <button type="button" onClick=${() => setOpen("edit")}>Edit</button>
    <button type="button" class="quiet tone-bad" onClick=${() => setOpen("revoke")}>Revoke</button>
    ${undo && html`<${Undo} text=${undo.text} run=${undo.run} onEnd=${() => setUndo(null)} key=${undo.at} />`}
    ${open === "edit" && html`<${EditModel} api=${api} model=${model} onClose=${close} onUndo=${setUndo} />`}
    ${open === "revoke" && html`<${Confirm} title=${`Revoke ${model.name}`} action="Revoke" word=${model.name} onClose=${close} onDone=${() => go(addressOf("/models"))} run=${() => api.change("DELETE", `/passports/${model.id}`)}>
      <p>Requests for it are refused from now on. This is final; its records stay, and its name can be registered again.</p>
    </${Confirm}>`}
  </div>`;
}

export function RegisterModel({ api, onClose }) {
  const [typed, setTyped] = useState(NEW);
  const metadata = metadataOf(typed);
  const given = Object.fromEntries(Object.entries(metadata).filter(([, value]) => value !== null));
  const making = useAction(() => api.change("POST", "/passports", { name: typed.name, type: "model", metadata: given }));
  const submit = async (event) => {
    event.preventDefault();
    if (await making.start()) go(addressOf(`/models/${encodeURIComponent(typed.name)}`));
  };
  return html`<${Dialog} title="Register a model" onClose=${onClose}><form onSubmit=${submit}>
    <p class="note">Requests name a registered model. Nodes that declare this name or an alias, or report it as loaded, serve it.</p>
    <${Field} name="name" label="Name" hint="as requests name it, and as the inference servers call it" value=${typed.name} onInput=${(name) => setTyped({ ...typed, name })} error=${making.error} required autofocus />
    <${Needs} typed=${typed} onChange=${setTyped} error=${making.error} />
    <${Refusal} error=${making.error} except=${Object.keys(NEW)} />
    <div class="dialog-buttons"><button type="button" onClick=${onClose}>Cancel</button><button type="submit" class="primary" disabled=${making.isBusy}>Register</button></div>
  </form></${Dialog}>`;
}

function EditModel({ api, model, onClose, onUndo }) {
  const [typed, setTyped] = useState(typedOf(model.metadata));
  const [former, wanted] = [metadataOf(typedOf(model.metadata)), metadataOf(typed)];
  const patch = patchOf(former, wanted);
  const save = (metadata) => api.change("PATCH", `/passports/${model.id}`, { metadata });
  const saving = useAction(() => save(patch));
  const submit = async (event) => {
    event.preventDefault();
    if ((await saving.start()) === undefined) return;
    retryAll();
    onUndo({ at: Date.now(), text: "The model was changed.", run: () => save(patchOf(wanted, former)) });
    onClose();
  };
  return html`<${Dialog} title=${`Edit ${model.name}`} onClose=${onClose}><form onSubmit=${submit}>
    <${Needs} typed=${typed} onChange=${setTyped} error=${saving.error} isFixed=${model.metadata.format === "api"} autofocus />
    <${Refusal} error=${saving.error} except=${Object.keys(NEW)} />
    <div class="dialog-buttons"><button type="button" onClick=${onClose}>Cancel</button><button type="submit" class="primary" disabled=${saving.isBusy || Object.keys(patch).length === 0}>Save</button></div>
  </form></${Dialog}>`;
}

function Needs({ typed, onChange, error, isFixed = false, autofocus }) {
  const field = (name, label, hint, more = {}) => html`<${Field} name=${name} label=${label} hint=${hint} value=${typed[name]} onInput=${(value) => onChange({ ...typed, [name]: value })} error=${error} ...${more} />`;
  return html`<${Fragment}>
    ${!isFixed && html`<div class="pair">
      ${field("format", "Format of its weights", "", { options: FORMATS, autofocus })}
      ${field("minVramGb", "VRAM that it needs, in GB", "empty: any; by quantization: fp16=140, q4=40")}
      ${field("contextLength", "Context, in tokens", "empty: any", { inputmode: "numeric" })}
      ${field("runtimes", "Only on these runtimes", "empty: all that run the format; with commas between")}
    </div>`}
    ${field("aliases", "Aliases", "other names of it, with commas between")}
    ${field("weights", "Split its requests", "by weight: this-model=9, another=1")}
    ${field("fallbacks", "Fallbacks", "models to try in turn when no node can serve it, with commas between")}
  </${Fragment}>`;
}

// Return the merge patch (RFC 7396) that makes one object of another: what is gone is null.
function patchOf(former, wanted) {
  const isObject = (value) => typeof value === "object" && value !== null && !Array.isArray(value);
  const names = Object.keys({ ...former, ...wanted }).filter((name) => JSON.stringify(former[name]) !== JSON.stringify(wanted[name]));
  return Object.fromEntries(names.map((name) => [name, isObject(former[name]) && isObject(wanted[name]) ? patchOf(former[name], wanted[name]) : wanted[name] ?? null]));
}

const listOf = (text) => text.split(",").map((each) => each.trim()).filter(Boolean);
const pairsOf = (values, write = String) => Object.entries(values).map(([name, value]) => `${name}=${write(value)}`).join(", ");
const objectOf = (text) => Object.fromEntries(listOf(text).map((pair) => [pair.slice(0, pair.lastIndexOf("=")).trim(), typedNumber(pair.slice(pair.lastIndexOf("=") + 1).trim())]));

// Return what a form has of a model's metadata.
function typedOf({ format, minVramGb, contextLength, route, ...metadata }) {
  const lists = { runtimes: metadata.runtimes, aliases: metadata.aliases, fallbacks: route?.fallbacks };
  return {
    format,
    minVramGb: typeof minVramGb === "object" && minVramGb !== null ? pairsOf(minVramGb) : String(minVramGb ?? ""),
    contextLength: String(contextLength ?? ""),
    weights: pairsOf(route?.weights ?? {}),
    ...Object.fromEntries(LISTS.map((name) => [name, (lists[name] ?? []).join(", ")])),
  };
}

// Return the metadata of a form as the API has it; null is what was left empty.
function metadataOf({ format, minVramGb, contextLength, runtimes, aliases, weights, fallbacks }) {
  const route = { ...(weights.trim() ? { weights: objectOf(weights) } : {}), ...(fallbacks.trim() ? { fallbacks: listOf(fallbacks) } : {}) };
  return {
    format,
    minVramGb: minVramGb.trim() === "" ? null : minVramGb.includes("=") ? objectOf(minVramGb) : typedNumber(minVramGb.trim()),
    contextLength: contextLength.trim() === "" ? null : typedNumber(contextLength.trim()),
    runtimes: listOf(runtimes).length > 0 ? listOf(runtimes) : null,
    aliases: listOf(aliases).length > 0 ? listOf(aliases) : null,
    route: Object.keys(route).length > 0 ? route : null,
  };
}
