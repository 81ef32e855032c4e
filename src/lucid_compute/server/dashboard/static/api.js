// The REST API as the page speaks to it: JSON, a key in the header, errors with the service's own sentences.
import { ROOT } from "./router.js";

const TIMEOUT_MS = 15_000;
const AWAY = new Set([500, 502, 503, 504]);

export class ApiError extends Error {
  constructor(status, code, message, details = {}) {
    super(message);
    this.status = status;
    this.code = code;
    this.details = details;
  }

  // What the service says of each field of the request: its path and a sentence.
  get fields() {
    return this.details?.fields ?? [];
  }

  // Whether nothing answered at all.
  get isUnreachable() {
    return this.status === 0;
  }

  // Whether the service itself can't be reached, or can't answer for now.
  get isAway() {
    return this.status === 0 || AWAY.has(this.status);
  }
}

export class Api {
  #key;
  #known = new Map();

  // `onRefused(error)` is told when the key is no longer valid.
  constructor(key, { onRefused = () => {} } = {}) {
    this.#key = key;
    this.onRefused = onRefused;
  }

  get key() {
    return this.#key;
  }

  // Answers what the path holds; the same object as before when the service says that nothing changed.
  async get(path, query = {}, signal = undefined) {
    const address = withQuery(path, query);
    const known = this.#known.get(address);
    const headers = { Authorization: `Bearer ${this.#key}`, Accept: "application/json" };
    if (known) headers["If-None-Match"] = known.etag;
    const response = await this.#send(address, headers, signal);
    if (response.status === 304 && known) return known.body;
    const body = await readJson(response);
    if (!response.ok) throw this.#failed(response, body);
    const etag = response.headers.get("etag");
    if (etag) this.#known.set(address, { etag, body });
    return body;
  }

  // Changes something: sends `body` as JSON, and returns what the service answers; null when that is nothing.
  async change(method, path, body = undefined, { query = {}, signal = undefined, headers = {}, timeoutMs = TIMEOUT_MS } = {}) {
    const about = { Authorization: `Bearer ${this.#key}`, Accept: "application/json", ...headers };
    if (body !== undefined) about["Content-Type"] = "application/json";
    const sent = body === undefined ? undefined : JSON.stringify(body);
    const response = await this.#send(withQuery(path, query), about, signal, { method, body: sent }, timeoutMs);
    const answer = await readJson(response);
    if (!response.ok) throw this.#failed(response, answer);
    return answer;
  }

  // Sends a request whose answer comes in pieces: `onResponse` is called with its head, `onEvent` with each event's JSON.
  async stream(path, body, signal, onEvent, onResponse) {
    const headers = { Authorization: `Bearer ${this.#key}`, "Content-Type": "application/json" };
    try {
      const response = await fetch(ROOT + path, { method: "POST", headers, body: JSON.stringify(body), signal, cache: "no-store", credentials: "omit" });
      if (!response.ok) throw this.#failed(response, await readJson(response));
      onResponse(response);
      const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
      let rest = "";
      for (let part = await reader.read(); !part.done; part = await reader.read()) {
        const events = (rest + part.value).split(/\r?\n\r?\n/);
        rest = events.pop();
        events.forEach((event) => this.#readEvent(response, event, onEvent));
      }
      return response;
    } catch (error) {
      if (signal.aborted || error instanceof ApiError) throw error;
      throw new ApiError(0, "UNREACHABLE", "The service can't be reached, or the answer broke off.");
    }
  }

  #readEvent(response, text, onEvent) {
    const data = text.split(/\r?\n/).filter((line) => line.startsWith("data:")).map((line) => line.slice(5).trimStart()).join("\n");
    if (!data || data === "[DONE]") return;
    const event = JSON.parse(data);
    if (event.error) throw this.#failed(response, event);
    onEvent(event);
  }

  // Answers what the path holds as text, such as CSV.
  async text(path, query) {
    const response = await this.#send(withQuery(path, query), { Authorization: `Bearer ${this.#key}` });
    if (!response.ok) throw this.#failed(response, await readJson(response));
    return response.text();
  }

  async #send(address, headers, signal, request = {}, timeoutMs = TIMEOUT_MS) {
    const timeout = AbortSignal.timeout(timeoutMs);
    const either = signal ? AbortSignal.any([signal, timeout]) : timeout;
    try {
      const early = request.method ? undefined : this.#takeEarly(address);
      if (early) return await early;
      return await fetch(ROOT + address, { ...request, headers, signal: either, cache: "no-store", credentials: "omit" });
    } catch (error) {
      if (signal?.aborted) throw error;
      throw new ApiError(0, "UNREACHABLE", "The service can't be reached.");
    }
  }

  // Takes over what `early.js` asked for with the same key.
  #takeEarly(address) {
    const early = window.lucidEarly;
    if (early?.key !== this.#key) return undefined;
    const answer = early.asked.get(address);
    early.asked.delete(address);
    return answer;
  }

  #failed(response, body) {
    const told = body?.error ?? {};
    const message = told.message ?? `The service answered ${response.status}.`;
    const error = new ApiError(response.status, told.code ?? "UNEXPECTED", message, told.details);
    if (error.status === 401) this.onRefused(error);
    return error;
  }
}

// A request as it is typed in a shell. The key is no part of it: it is read from the variable that the SDK reads.
export function curlOf(path, body = null) {
  const parts = ["curl -sS", `${location.origin}${ROOT}${path}`, '-H "Authorization: Bearer $LUCID_API_KEY"'];
  if (body) parts.push("-H 'Content-Type: application/json'", `-d '${JSON.stringify(body).replaceAll("'", "'\\''")}'`);
  return parts.join(" ");
}

function withQuery(path, query) {
  const given = Object.entries(query).filter(([, value]) => value !== "" && value !== null && value !== undefined);
  const text = new URLSearchParams(given).toString();
  return text ? `${path}?${text}` : path;
}

async function readJson(response) {
  try {
    return await response.json();
  } catch {
    return null;
  }
}
