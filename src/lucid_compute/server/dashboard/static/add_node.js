// Adding a node: a key, one command with it, and what the service sees of the node until requests can be sent to it.
import { Dialog, Field, Refusal, useAction } from "./acting.js";
import { Command } from "./copying.js";
import { gigabytes, milliseconds } from "./format.js";
import { inPlace } from "./fixes.js";
import { Fragment, html, useEffect, useMemo, useState } from "./html.js";
import { commandOf, quoted, WAYS } from "./install_commands.js";
import { Choice } from "./parts.js";
import { usePolled } from "./polling.js";
import { ROOT, addressOf } from "./router.js";

const SECONDS = 2;
const ANSWER_MS = 120_000; // a server may load the model first
const PROBE_SECONDS = 11; // a host is probed once in ten seconds
const IS_HERE = /^(localhost|127\.[\d.]+|\[::1\])$/.test(location.hostname);
const SERVICE = `${location.origin}${ROOT}`;
const SIGNS = { ok: ["●", "good", "done"], failed: ["▲", "bad", "failed"], waiting: ["○", "muted", "waiting"] };
const FORMATS = [["gguf", "gguf"], ["safetensors", "safetensors"]];

export function AddNode({ api, apiKey, owner, onClose }) {
  const [about, setAbout] = useState({ way: "clone", name: "gpu-1", owner: owner ?? "", url: "http://localhost:8080", publicUrl: "", isOutbound: false, vram: "", gpu: "", model: "" });
  const [key, setKey] = useState("");
  const change = (name) => (value) => setAbout((former) => ({ ...former, [name]: value }));
  return html`<${Dialog} title="Add a node" onClose=${onClose} wide>
    ${key
      ? html`<${Connecting} api=${api} about=${about} secret=${key} onWay=${change("way")} onClose=${onClose} />`
      : html`<${About} api=${api} apiKey=${apiKey} isAdmin=${owner === null} about=${about} change=${change} onKey=${setKey} />`}
  </${Dialog}>`;
}

// The first step: what the node is, and a key for it.
function About({ api, apiKey, isAdmin, about, change, onKey }) {
  const making = useAction(() => api.change("POST", "/keys", { name: `node ${about.name}`, owner: about.owner, scopes: ["compute"] }));
  const [other, setOther] = useState("");
  const isByHand = about.way === "curl";
  const submit = async (event) => {
    event.preventDefault();
    if (!isAdmin || other) return onKey(other || apiKey);
    const made = await making.start();
    return made && onKey(made.key);
  };
  return html`<form class="fields" onSubmit=${submit}>
    <p class="note">On the machine of a running inference server (vLLM, TGI, SGLang, llama.cpp, Ollama), one command registers it and keeps it alive.</p>
    <${Ways} about=${about} onWay=${change("way")} />
    <${Field} name="name" label="Name of the node" value=${about.name} onInput=${change("name")} error=${making.error} required autofocus />
    ${isAdmin && html`<${Field} name="owner" label="Owner" hint="who provides the node and earns with it" value=${about.owner} onInput=${change("owner")} error=${making.error} required=${!other} />`}
    <${Field} name="url" label="Inference server, as its machine reaches it" type="url" value=${about.url} onInput=${change("url")} required />
    ${!isByHand && html`<label class="check"><input type="checkbox" id="outbound" checked=${about.isOutbound} onChange=${(event) => change("isOutbound")(event.currentTarget.checked)} /> <span>This machine can't be reached from the service (NAT, firewall) <span class="note">The agent connects to the service then, and requests come over that connection.</span></span></label>`}
    ${!about.isOutbound && html`<${Field} name="publicUrl" label="The same server, as this service reaches it" hint=${IS_HERE ? "leave it empty when it is the same address" : "an address that this service can connect to"} type="url" placeholder="http://your-gpu:8080" value=${about.publicUrl} onInput=${change("publicUrl")} required=${!IS_HERE} />`}
    <${Field} name="vram" label="Memory of its GPUs" hint=${isByHand ? "as 80GB" : "as 80GB; only where there is no NVIDIA driver that knows it"} value=${about.vram} onInput=${change("vram")} required=${isByHand} pattern="[0-9.]+ ?[GgMm][Bb]?" />
    ${isByHand && html`<${Field} name="gpu" label="GPU" value=${about.gpu} onInput=${change("gpu")} /><${Field} name="model" label="Model that it serves" value=${about.model} onInput=${change("model")} />`}
    ${(!isAdmin || making.error) && html`<${OtherKey} about=${about} isAdmin=${isAdmin} value=${other} onInput=${setOther} />`}
    <${Refusal} error=${making.error} except=${["name", "owner"]} />
    <div class="dialog-buttons"><button type="submit" class="primary" disabled=${making.isBusy}>${isAdmin && !other ? "Make a key and show the command" : "Show the command"}</button></div>
  </form>`;
}

// Only an admin's key makes keys. A provider's own will do, when it has the scope compute.
function OtherKey({ about, isAdmin, value, onInput }) {
  return html`<${Fragment}>
    <${Field} name="key" type="password" label="A key with the scope compute" value=${value} onInput=${onInput}
      hint=${isAdmin ? "Left empty, a new one is made." : "Left empty, the key of this login is filled in. Each machine had better have a key of its own: a stolen one then affects one node only."} />
    ${!isAdmin && html`<p class="note">Only an admin can make keys. An admin makes one for this node with the command below, or under Keys.</p><${Command} text=${`.venv/bin/lucid keys create ${quoted(`node ${about.name}`)} --owner ${quoted(about.owner)} --scope compute`} />`}
  </${Fragment}>`;
}

// By hand, nothing keeps up a connection to the service.
function Ways({ about: { way, isOutbound }, onWay }) {
  return html`<div><${Choice} label="How it is started" options=${isOutbound ? WAYS.filter(([name]) => name !== "curl") : WAYS} value=${way} onChange=${onWay} /><p class="note">${WAYS.find(([name]) => name === way)[2]}</p></div>`;
}

// The second step: the command, and what the service sees of the node.
function Connecting({ api, about, secret, onWay, onClose }) {
  const startedAt = useMemo(() => performance.now(), []);
  const found = usePolled((signal) => api.get("/compute", { search: about.name, owner: about.owner, perPage: 50 }, signal), SECONDS, [api]);
  const node = found.data?.nodes.find(({ name }) => name === about.name);
  const age = node?.health.heartbeatAgeSeconds ?? null;
  const [isHeard, setHeard] = useState(false);
  useEffect(() => {
    if (age !== null && age <= (performance.now() - startedAt) / 1000) setHeard(true);
  }, [found.data]);
  return html`<div class="fields">
    <${Ways} about=${about} onWay=${onWay} />
    <${Command} text=${commandOf(about.way, { ...about, service: SERVICE, key: secret })} />
    <p class="note">The key is in it, and is shown only now. Copy the command before you close this.</p>
    <ol class="steps" aria-live="polite" aria-label="What the service sees">
      <${Step} state=${node ? "ok" : "waiting"} title="Registered">${node ? `${node.name}: ${factsOf(node.metadata)}` : "Waiting for the node to register. Run the command."}</${Step}>
      <${Step} state=${isHeard ? "ok" : "waiting"} title="First heartbeat">${isHeard ? reportOf(node.health) : node ? "Waiting for the first heartbeat." : ""}</${Step}>
      ${node && isHeard && html`<${Examination} api=${api} node=${node} onClose=${onClose} />`}
    </ol>
  </div>`;
}

const factsOf = ({ gpu, vramGb, runtimes = [], inferenceUrl }) => [gpu, gigabytes(vramGb), runtimes.map((one) => one.name ?? one).join(", "), inferenceUrl].filter(Boolean).join(" · ");
const reportOf = ({ availableModels }) => (availableModels.length > 0 ? `Heard. Models loaded: ${availableModels.join(", ")}.` : "Heard. It reports no loaded model.");

// The doctor's checks that need no access to the node's machine. Each failure has its fix.
function Examination({ api, node, onClose }) {
  const [isReached, setReached] = useState(false);
  const declared = usePolled((signal) => api.get(`/compute/models/${node.id}`, {}, signal), SECONDS * 2, [api, node.id]);
  const { health } = node;
  const isHealthy = health.status === "healthy";
  const known = declared.data?.models ?? [];
  const resolved = known.filter(({ modelPassportId }) => modelPassportId);
  const model = resolved.find(({ id }) => health.availableModels.includes(id)) ?? resolved[0];
  return html`<${Fragment}>
    <${Step} state=${isHealthy ? "ok" : "failed"} title="What it reports">${isHealthy ? "It says that it is healthy." : health.reasons.map(({ message }) => inPlace(message, node.id)).join(" ")}</${Step}>
    <${Reach} api=${api} id=${node.id} onReached=${setReached} />
    <${Step} state=${model ? "ok" : declared.data ? "failed" : "waiting"} title="Models">
      ${known.length === 0 ? "It declares no model yet." : known.map((one) => html`<${Model} key=${one.id} api=${api} node=${node} model=${one} />`)}
    </${Step}>
    ${isReached && isHealthy && model && html`<${Served} api=${api} id=${model.modelPassportId} name=${model.id} node=${node} onClose=${onClose} />`}
    <li class="note">To look at everything from the node's own machine: <code>lucid doctor ${node.id}</code></li>
  </${Fragment}>`;
}

function Reach({ api, id, onReached }) {
  const [found, setFound] = useState(null);
  const probe = usePolled((signal) => (found?.reachable ? found : api.change("POST", `/compute/probe/${id}`, undefined, { signal })), PROBE_SECONDS, [api, id]);
  useEffect(() => {
    setFound(probe.data ?? null);
    onReached(Boolean(probe.data?.reachable));
  }, [probe.data]);
  const state = found ? (found.reachable ? "ok" : "failed") : probe.error ? "failed" : "waiting";
  const text = found ? (found.reachable ? `The service reaches it: connected in ${milliseconds(found.connectMs)}, answered in ${milliseconds(found.answerMs)}.` : found.message) : probe.error?.message ?? "The service is connecting to it.";
  return html`<${Step} state=${state} title="Reached from the service">${text}</${Step}>`;
}

function Model({ api, node, model }) {
  const runtimes = (node.metadata.runtimes ?? []).map((one) => one.name ?? one);
  const [format, setFormat] = useState(runtimes.some((name) => /llama|ollama/.test(name)) ? "gguf" : "safetensors");
  const adding = useAction(() => api.change("POST", "/passports", { name: model.id, type: "model", metadata: { format } }));
  if (model.modelPassportId) return html`<span class="line">${model.id} is a registered model.</span>`;
  return html`<span class="line">${model.id} is no registered model yet, so nobody can ask for it. <span class="buttons">
    <select aria-label=${`Format of ${model.id}`} onChange=${(event) => setFormat(event.currentTarget.value)}>${FORMATS.map(([value, text]) => html`<option value=${value} selected=${value === format} key=${value}>${text}</option>`)}</select>
    <button type="button" disabled=${adding.isBusy} onClick=${adding.start}>Register it</button></span><${Refusal} error=${adding.error} /></span>`;
}

function Served({ api, id, name, node, onClose }) {
  const why = usePolled((signal) => api.get(`/models/${encodeURIComponent(id)}/availability`, { page: 1, perPage: 1 }, signal), SECONDS * 2, [api, id]);
  const sending = useAction(() => api.change("POST", "/v1/chat/completions", { model: name, messages: [{ role: "user", content: "Say hello." }], max_tokens: 16 }, { timeoutMs: ANSWER_MS }));
  const isServed = why.data?.served;
  return html`<${Step} state=${isServed ? "ok" : "waiting"} title=${isServed ? "Requests can be sent" : "Not served yet"}>
    ${isServed && html`<span class="buttons">
      <button type="button" onClick=${sending.start} disabled=${sending.isBusy}>${sending.isBusy ? "Sending…" : "Send one"}</button>
      <a class="button" href=${addressOf(`/nodes/${node.id}`)} onClick=${() => setTimeout(onClose)}>Open the node</a>
    </span>`}
    ${sending.result && html`<q class="line">${sending.result.choices?.[0]?.message?.content ?? ""}</q>`}
    <${Refusal} error=${sending.error} />
  </${Step}>`;
}

function Step({ state, title, children }) {
  const [sign, tone, word] = SIGNS[state];
  return html`<li class=${`step step-${state}`}><span class=${`tone-${tone}`} aria-hidden="true">${sign}</span><span><strong>${title}</strong> <span class="hidden">${word}</span><span class="line">${children}</span></span></li>`;
}
