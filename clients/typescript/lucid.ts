/**
 * The TypeScript client of lucid-compute: one file without dependencies, for Node 18 and newer, Deno and browsers.
 *
 *     const lucid = new Lucid({ baseUrl: "https://lucid.example.com", apiKey: "lk_live_…" });
 *     const passport = await lucid.passports.create({ name: "my-gpu-node", type: "compute", metadata: { … } });
 *
 * It has only syntax that can be erased, so Node, Deno and bundlers run it as it is. Chat completions are OpenAI's
 * protocol: use OpenAI's client with `${baseUrl}/v1`.
 */

export type JsonValue = string | number | boolean | null | JsonValue[] | { [key: string]: JsonValue };
/** US dollars: the service accepts a number or a decimal string, and answers an exact decimal string. */
export type Money = string;
/** An RFC 3339 instant in UTC, such as `2026-01-31T12:00:00.000Z`. */
export type Instant = string;

export type PassportType = "compute" | "model" | "agent" | "tool" | "dataset";
export type Scope = "compute" | "passports:read" | "passports:write" | "inference:run" | "admin";
export type NodeStatus = "healthy" | "unhealthy" | "draining";

export interface Pagination {
  total: number;
  page: number;
  perPage: number;
  totalPages: number;
}

export interface Passport {
  id: string;
  type: PassportType;
  name: string;
  description: string | null;
  version: string | null;
  tags: string[];
  owner: string;
  status: "active" | "deprecated" | "revoked";
  metadata: Record<string, JsonValue>;
  createdAt: Instant;
  updatedAt: Instant;
}

export interface NewPassport {
  name: string;
  type: PassportType;
  metadata?: Record<string, unknown>;
  description?: string;
  version?: string;
  tags?: string[];
  /** Another owner than the key's: for admins. */
  owner?: string;
}

export interface PassportChanges {
  name?: string;
  description?: string | null;
  version?: string | null;
  tags?: string[] | null;
  status?: "active" | "deprecated";
  /** Merged; null removes a key. */
  metadata?: Record<string, unknown>;
}

export interface Heartbeat {
  passportId: string;
  status: NodeStatus;
  /** 0.0 to 1.0; null is unknown. */
  load: number | null;
  availableModels: string[];
  queueDepth: number | null;
  bootId?: string;
  sequence?: number;
  sentAt?: Instant;
  inFlight?: number;
  runtime?: { name: string; version?: string };
  gpus?: Record<string, unknown>[];
  jobsCompleted?: number;
  jobsFailed?: number;
  avgLatencyMs?: number;
  tokensGenerated?: number;
}

export interface HeartbeatAnswer {
  passportId: string;
  status: NodeStatus;
  receivedAt: Instant;
  freshUntil: Instant;
  unhealthyAt: Instant;
  nextHeartbeatInSeconds: number;
  drain: boolean;
}

export interface Reason {
  code: string;
  message: string;
  wanted: JsonValue;
  found: JsonValue;
}

export interface NodeHealth {
  passportId: string;
  status: NodeStatus;
  fresh: boolean;
  stopped: boolean;
  uptimeSeconds: number;
  jobsCompleted: number | null;
  avgLatencyMs: number | null;
  errorRate: number | null;
  lastHeartbeatAt: Instant | null;
  heartbeatAgeSeconds: number | null;
  load: number | null;
  queueDepth: number | null;
  inFlight: number;
  drained: boolean;
  availableModels: string[];
  reasons: Reason[];
  reported: Record<string, JsonValue> | null;
}

export interface ComputeNode extends Passport {
  health: NodeHealth;
}

export interface ModelDeclaration {
  id: string;
  maxTokens?: number | null;
  quantization?: string | null;
}

export interface Declaration {
  passportId: string;
  models: { id: string; maxTokens: number | null; quantization: string | null; modelPassportId: string | null }[];
}

export interface Model extends Passport {
  available: boolean;
  served: boolean;
}

export interface Availability {
  available: boolean;
  served: boolean;
  checkedAt: Instant;
  nodes: { passportId: string; eligible: boolean; reasons: Reason[] }[];
  summary: Record<string, number>;
  /** Of a model with a route: the models that requests go to. */
  route?: Variant[];
}

export interface Variant {
  model: string;
  modelPassportId: string;
  /** null for a fallback. */
  weight: number | null;
  available: boolean;
  served: boolean;
}

export interface NodeEvent {
  id: string;
  passportId: string;
  type: string;
  at: Instant;
  reason: string | null;
  details: Record<string, JsonValue>;
}

export interface FleetEvent extends NodeEvent {
  name: string;
  owner: string;
}

/** `place` is by expected wait, from 1; null when the node may not serve the model. */
export interface ModelRouting {
  model: string;
  modelPassportId: string;
  place: number | null;
  nodes: number;
  waitMs: number | null;
  reasons: Reason[];
}

export interface NodeRouting {
  passportId: string;
  checkedAt: Instant;
  breakerOpenSince: Instant | null;
  breakerRetryAt: Instant | null;
  models: ModelRouting[];
}

export interface Job {
  id: string;
  attempt: number;
  passportId: string | null;
  owner: string | null;
  modelId: string;
  model: string;
  outcome: "running" | "completed" | "failed" | "rejected" | "cancelled" | "lost";
  reason: string | null;
  status: number | null;
  endpoint: string;
  stream: boolean;
  tokensIn: number | null;
  tokensOut: number | null;
  tokensCounted: boolean;
  priceUsd: Money | null;
  firstByteMs: number | null;
  latencyMs: number | null;
  startedAt: Instant;
  createdAt: Instant;
  consumer: string | null;
  keyId: string | null;
}

export interface KeyLimits {
  requestsPerMinute?: number | null;
  tokensPerMinute?: number | null;
  concurrency?: number | null;
  /** With `budgetPeriod`. */
  budgetUsd?: Money | number | null;
  budgetPeriod?: "day" | "month" | null;
  /** Ids, names, aliases, or patterns such as `llama-*`. */
  models?: string[] | null;
}

export interface NewKey {
  name: string;
  owner: string;
  scopes: Scope[];
  passportId?: string;
  expiresAt?: Instant;
  limits?: KeyLimits;
}

/** What is left out stays; null removes, also inside `limits`. */
export interface KeyChanges {
  name?: string;
  expiresAt?: Instant | null;
  limits?: KeyLimits | null;
}

export interface Key {
  id: string;
  name: string;
  owner: string;
  scopes: Scope[];
  prefix: string;
  lastFour: string;
  passportId: string | null;
  expiresAt: Instant | null;
  limits: KeyLimits | null;
  createdAt: Instant;
  rotatedAt: Instant | null;
  lastUsedAt: Instant | null;
}

export interface KeyWithSecret extends Key {
  key: string;
}

export type UsageGroup = "day" | "model" | "key" | "owner";

export interface UsageTotal {
  requests: number;
  completed: number;
  errors: number;
  cancelled: number;
  tokensIn: number;
  tokensOut: number;
  priceUsd: Money;
}

export interface UsageEntry extends UsageTotal {
  day: string | null;
  modelId: string | null;
  model: string | null;
  keyId: string | null;
  key: string | null;
  owner: string | null;
}

export interface UsageReport {
  owner: string | null;
  from: string;
  to: string;
  groupBy: UsageGroup[];
  usage: UsageEntry[];
  total: UsageTotal;
  budgets:
    | { keyId: string; name: string; budgetUsd: Money; budgetPeriod: "day" | "month"; spentUsd: Money; resetsAt: Instant }[]
    | null;
}

export interface UsageQuery {
  /** An instant, a day, or how long ago: `-7d`. The start of this month, if it is left out. */
  from?: string;
  to?: string;
  groupBy?: UsageGroup[];
  model?: string;
  keyId?: string;
  /** For admins. */
  owner?: string;
}

export interface MatchRequest {
  model: string;
  lucid?: Record<string, unknown>;
  [field: string]: unknown;
}

/** A call that did not succeed: `code` and `message` say why, `requestId` finds it in the service's log. */
export class LucidError extends Error {
  readonly code: string;
  /** The HTTP status; null if there was no response. */
  readonly status: number | null;
  readonly details: Record<string, JsonValue>;
  readonly requestId: string | null;
  /** How long the service asks to wait; null if it does not say. */
  readonly retryAfterSeconds: number | null;

  constructor(message: string, facts: Partial<ErrorFacts> = {}) {
    super(message);
    this.name = new.target.name;
    this.code = facts.code ?? "CLIENT_ERROR";
    this.status = facts.status ?? null;
    this.details = facts.details ?? {};
    this.requestId = facts.requestId ?? null;
    this.retryAfterSeconds = facts.retryAfterSeconds ?? null;
  }
}

interface ErrorFacts {
  code: string;
  status: number;
  details: Record<string, JsonValue>;
  requestId: string | null;
  retryAfterSeconds: number | null;
}

/** The service can't be reached, or the connection broke. */
export class ConnectionFailed extends LucidError {}
/** No complete response came in time. */
export class TimedOut extends LucidError {}
/** The response is not the service's: a proxy's page, another service, a redirect. */
export class UnexpectedAnswer extends LucidError {}
/** The service refused the call. */
export class ApiError extends LucidError {}
/** `details.fields` lists each fault as `{path, message}`. */
export class InvalidRequest extends ApiError {}
export class Unauthorized extends ApiError {}
export class Forbidden extends ApiError {}
export class NotFound extends ApiError {}
export class Conflict extends ApiError {}
/** The node was deregistered or revoked, which is final. */
export class NodeDeregistered extends ApiError {}
export class PayloadTooLarge extends ApiError {}
export class RateLimited extends ApiError {}
/** The key's budget is spent until `details.resetsAt`. */
export class BudgetExceeded extends RateLimited {}
export class Unavailable extends ApiError {}

const BY_STATUS: Record<number, typeof ApiError> = {
  400: InvalidRequest,
  401: Unauthorized,
  403: Forbidden,
  404: NotFound,
  409: Conflict,
  410: NodeDeregistered,
  413: PayloadTooLarge,
  422: InvalidRequest,
  429: RateLimited,
  502: Unavailable,
  503: Unavailable,
  504: Unavailable,
};

export interface LucidOptions {
  /** `LUCID_API_URL` or `http://127.0.0.1:8000`, if it is left out. */
  baseUrl?: string;
  /** `LUCID_API_KEY`, if it is left out. */
  apiKey?: string;
  /** Bounds each attempt. */
  timeoutMs?: number;
  /** How often a call that may be repeated is sent again. */
  retries?: number;
  fetch?: typeof fetch;
}

export interface CallOptions {
  /** Ends the call and its pauses. */
  signal?: AbortSignal;
  timeoutMs?: number;
}

export interface CreateOptions extends CallOptions {
  /** Your own, so that a repetition after a restart finds what the first call created. */
  idempotencyKey?: string;
}

type QueryValue = string | number | boolean | readonly string[] | null | undefined;
/** The parameters of a call, named as on the wire. */
type QueryValues = { readonly [name: string]: QueryValue };

interface Call {
  method: string;
  path: string;
  query?: QueryValues;
  body?: unknown;
  headers?: Record<string, string>;
  /** Sending it twice has the effect of sending it once. */
  isRepeatable?: boolean;
  /** A 404 to a repetition means that the first attempt did the work. */
  isDoneWhenMissing?: boolean;
  isText?: boolean;
}

const DEFAULT_URL = "http://127.0.0.1:8000";
const DEFAULT_TIMEOUT_MS = 30_000;
const DEFAULT_RETRIES = 3;
const FIRST_PAUSE_MS = 250;
const LONGEST_PAUSE_MS = 8_000;
/** A longer `Retry-After` is the caller's to wait for. */
const LONGEST_WAIT_MS = 60_000;
const LONGEST_TIMER_MS = 2 ** 31 - 1;

class Transport {
  readonly baseUrl: string;
  readonly #key: string;
  readonly #timeoutMs: number;
  readonly #retries: number;
  readonly #fetch: typeof fetch;

  constructor(options: LucidOptions) {
    this.baseUrl = readUrl(options.baseUrl ?? environment("LUCID_API_URL") ?? DEFAULT_URL);
    this.#key = (options.apiKey ?? environment("LUCID_API_KEY") ?? "").trim();
    this.#timeoutMs = readTimeout(options.timeoutMs ?? DEFAULT_TIMEOUT_MS);
    this.#retries = options.retries ?? DEFAULT_RETRIES;
    this.#fetch = options.fetch ?? ((...sent) => globalThis.fetch(...sent));
    if (!/^[\x21-\x7e]*$/.test(this.#key)) {
      throw new LucidError("The key has characters that no key has. Copy it again.", { code: "CONFIGURATION" });
    }
  }

  async send<T>(call: Call, options: CallOptions = {}): Promise<T> {
    for (let attempt = 0; ; attempt++) {
      try {
        return (await this.#attempt(call, options)) as T;
      } catch (error) {
        if (attempt > 0 && call.isDoneWhenMissing && error instanceof NotFound) {
          return undefined as T;
        }
        const pause = attempt < this.#retries && call.isRepeatable !== false ? pauseAfter(error, attempt) : null;
        if (pause === null) {
          throw error;
        }
        await sleep(pause, options.signal);
      }
    }
  }

  async #attempt(call: Call, options: CallOptions): Promise<unknown> {
    options.signal?.throwIfAborted();
    const timeoutMs = readTimeout(options.timeoutMs ?? this.#timeoutMs);
    const controller = new AbortController();
    const abort = () => controller.abort();
    const timer = setTimeout(abort, timeoutMs);
    options.signal?.addEventListener("abort", abort);
    try {
      const response = await this.#fetch(this.baseUrl + call.path + writeQuery(call.query), {
        method: call.method,
        headers: this.#headers(call),
        body: call.body === undefined ? null : JSON.stringify(call.body),
        redirect: "manual",
        signal: controller.signal,
      });
      return readResponse(call, response, await response.text());
    } catch (error) {
      if (error instanceof LucidError) {
        throw error;
      }
      options.signal?.throwIfAborted();
      if (controller.signal.aborted) {
        const message = `${call.method} ${call.path} took longer than ${timeoutMs} ms.`;
        throw new TimedOut(message, { code: "TIMED_OUT" });
      }
      throw new ConnectionFailed(`${this.baseUrl} can't be reached: ${reasonOf(error)}.`, { code: "CONNECTION_FAILED" });
    } finally {
      clearTimeout(timer);
      options.signal?.removeEventListener("abort", abort);
    }
  }

  #headers(call: Call): Record<string, string> {
    const headers: Record<string, string> = { accept: call.isText ? "text/csv" : "application/json", ...call.headers };
    if (this.#key) {
      headers["authorization"] = `Bearer ${this.#key}`;
    }
    if (call.body !== undefined) {
      headers["content-type"] = "application/json";
    }
    return headers;
  }
}

/** A list of the service: `for await` reads all of it, `page` one page. */
export class Pages<T> implements AsyncIterable<T> {
  readonly #transport: Transport;
  readonly #path: string;
  readonly #plural: string;
  readonly #query: QueryValues;
  readonly #options: CallOptions;

  constructor(transport: Transport, path: string, plural: string, query: QueryValues, options: CallOptions) {
    this.#transport = transport;
    this.#path = path;
    this.#plural = plural;
    this.#query = query;
    this.#options = options;
  }

  /** Read one page; pages count from 1. */
  async page(number = 1, perPage = 100): Promise<{ items: T[]; pagination: Pagination }> {
    const query = { ...this.#query, page: number, perPage };
    const call = { method: "GET", path: this.#path, query };
    const found = await this.#transport.send<Record<string, unknown>>(call, this.#options);
    return { items: found[this.#plural] as T[], pagination: found["pagination"] as Pagination };
  }

  /** Read the complete list. */
  async all(): Promise<T[]> {
    const items: T[] = [];
    for await (const item of this) {
      items.push(item);
    }
    return items;
  }

  async *[Symbol.asyncIterator](): AsyncGenerator<T> {
    for (let number = 1; ; number++) {
      const { items, pagination } = await this.page(number);
      yield* items;
      if (number >= pagination.totalPages) {
        return;
      }
    }
  }
}

class Passports {
  readonly #transport: Transport;

  constructor(transport: Transport) {
    this.#transport = transport;
  }

  /** Register a node, a model, or another thing. A repetition after a lost response finds what the first created. */
  create(passport: NewPassport, options: CreateOptions = {}): Promise<Passport> {
    const headers = { "idempotency-key": options.idempotencyKey ?? randomId() };
    return this.#transport.send({ method: "POST", path: "/passports", body: passport, headers }, options);
  }

  get(id: string, options?: CallOptions): Promise<Passport> {
    return this.#transport.send({ method: "GET", path: pathOf("passports", id) }, options);
  }

  list(
    query: { type?: PassportType; owner?: string; status?: string; tags?: string[]; search?: string } = {},
    options: CallOptions = {},
  ): Pages<Passport> {
    return new Pages(this.#transport, "/passports", "passports", query, options);
  }

  update(id: string, changes: PassportChanges, options?: CallOptions): Promise<Passport> {
    return this.#transport.send({ method: "PATCH", path: pathOf("passports", id), body: changes }, options);
  }

  /** Revoke a passport, which is final. */
  revoke(id: string, options?: CallOptions): Promise<void> {
    const call = { method: "DELETE", path: pathOf("passports", id), isDoneWhenMissing: true };
    return this.#transport.send(call, options);
  }
}

class Compute {
  readonly #transport: Transport;

  constructor(transport: Transport) {
    this.#transport = transport;
  }

  /** Report the state of a node. Send the next heartbeat after `nextHeartbeatInSeconds`. */
  heartbeat(heartbeat: Heartbeat, options?: CallOptions): Promise<HeartbeatAnswer> {
    return this.#transport.send({ method: "POST", path: "/compute/heartbeat", body: heartbeat }, options);
  }

  health(passportId: string, options?: CallOptions): Promise<NodeHealth> {
    return this.#transport.send({ method: "GET", path: pathOf("compute", "health", passportId) }, options);
  }

  /** Replace the models that a node declares. */
  updateModels(
    passportId: string,
    declaration: { models: ModelDeclaration[] },
    options?: CallOptions,
  ): Promise<Declaration> {
    const call = { method: "PUT", path: pathOf("compute", "models", passportId), body: declaration };
    return this.#transport.send(call, options);
  }

  declaredModels(passportId: string, options?: CallOptions): Promise<Declaration> {
    return this.#transport.send({ method: "GET", path: pathOf("compute", "models", passportId) }, options);
  }

  /** Start no more requests on a node, and let those that run finish. */
  drain(
    passportId: string,
    options?: CallOptions,
  ): Promise<{ passportId: string; status: NodeStatus; inFlight: number; drained: boolean }> {
    return this.#transport.send({ method: "POST", path: pathOf("compute", "drain", passportId) }, options);
  }

  resume(passportId: string, options?: CallOptions): Promise<NodeHealth> {
    return this.#transport.send({ method: "POST", path: pathOf("compute", "resume", passportId) }, options);
  }

  /** Deregister a node, which is final. It must have no requests, unless `waitSeconds` or `force` says otherwise. */
  deregister(
    passportId: string,
    options: CallOptions & { force?: boolean; waitSeconds?: number } = {},
  ): Promise<{ passportId: string; status: "deregistered" }> {
    const query = { force: options.force || undefined, waitSeconds: options.waitSeconds };
    const timeoutMs = options.timeoutMs ?? DEFAULT_TIMEOUT_MS + 1000 * (options.waitSeconds ?? 0);
    const call = { method: "POST", path: pathOf("compute", "deregister", passportId), query };
    return this.#transport.send(call, { ...options, timeoutMs });
  }

  list(
    query: {
      status?: NodeStatus;
      region?: string;
      runtime?: string;
      minVram?: number;
      gpu?: string;
      model?: string;
      owner?: string;
      search?: string;
    } = {},
    options: CallOptions = {},
  ): Pages<ComputeNode> {
    return new Pages(this.#transport, "/compute", "nodes", query, options);
  }

  events(
    passportId: string,
    query: { since?: Instant; type?: string } = {},
    options: CallOptions = {},
  ): Pages<NodeEvent> {
    return new Pages(this.#transport, pathOf("compute", "events", passportId), "events", query, options);
  }

  /** Say whether a node would be sent a request now, for each of its models, and whether its breaker is open. */
  routing(passportId: string, options?: CallOptions): Promise<NodeRouting> {
    return this.#transport.send({ method: "GET", path: pathOf("compute", "routing", passportId) }, options);
  }

  /** List the events of all your nodes; without `since`, those of the last seven days. */
  fleetEvents(
    query: { passportId?: string; type?: string; since?: Instant; until?: Instant; owner?: string } = {},
    options: CallOptions = {},
  ): Pages<FleetEvent> {
    return new Pages(this.#transport, "/compute/events", "events", query, options);
  }

  /** List the attempts on your nodes, or with `consumer` those of your own requests. */
  jobs(
    query: {
      passportId?: string;
      model?: string;
      outcome?: Job["outcome"];
      since?: Instant;
      until?: Instant;
      owner?: string;
      consumer?: string;
    } = {},
    options: CallOptions = {},
  ): Pages<Job> {
    return new Pages(this.#transport, "/compute/jobs", "jobs", query, options);
  }
}

class Models {
  readonly #transport: Transport;

  constructor(transport: Transport) {
    this.#transport = transport;
  }

  /** List models: `available: true` those that can run now, `false` those that can't, and all without it. */
  list(
    query: {
      available?: boolean;
      format?: "api" | "safetensors" | "gguf";
      runtime?: string;
      maxVram?: number;
      owner?: string;
      tags?: string[];
      search?: string;
    } = {},
    options: CallOptions = {},
  ): Pages<Model> {
    return new Pages(this.#transport, "/models", "models", query, options);
  }

  get(idOrName: string, options?: CallOptions): Promise<Model> {
    return this.#transport.send({ method: "GET", path: pathOf("models", idOrName) }, options);
  }

  /** Explain why a model is available or not, node by node. */
  availability(idOrName: string, options?: CallOptions): Promise<Availability> {
    return this.#transport.send({ method: "GET", path: `${pathOf("models", idOrName)}/availability` }, options);
  }
}

class Keys {
  readonly #transport: Transport;

  constructor(transport: Transport) {
    this.#transport = transport;
  }

  /** Create a key. Its secret is in this response only, so the call is never repeated. */
  create(key: NewKey, options?: CallOptions): Promise<KeyWithSecret> {
    return this.#transport.send({ method: "POST", path: "/keys", body: key, isRepeatable: false }, options);
  }

  list(query: { owner?: string } = {}, options: CallOptions = {}): Pages<Key> {
    return new Pages(this.#transport, "/keys", "keys", query, options);
  }

  /** Change a key's name, expiry or limits; its secret stays. */
  update(id: string, changes: KeyChanges, options?: CallOptions): Promise<Key> {
    return this.#transport.send({ method: "PATCH", path: pathOf("keys", id), body: changes }, options);
  }

  /** Read the key of this client: whose it is, what it may do, its limits and its end. */
  me(options?: CallOptions): Promise<Key> {
    return this.#transport.send({ method: "GET", path: "/me" }, options);
  }

  /** Give a key a new secret. The previous one stays valid for 24 hours, or ends `now`. The call is never repeated. */
  rotate(id: string, options: CallOptions & { now?: boolean } = {}): Promise<KeyWithSecret> {
    const path = pathOf("keys", id, "rotate");
    const call = { method: "POST", path, body: { now: options.now ?? false }, isRepeatable: false };
    return this.#transport.send(call, options);
  }

  revoke(id: string, options?: CallOptions): Promise<void> {
    return this.#transport.send({ method: "DELETE", path: pathOf("keys", id), isDoneWhenMissing: true }, options);
  }
}

class Usage {
  readonly #transport: Transport;

  constructor(transport: Transport) {
    this.#transport = transport;
  }

  /** Read what your keys have used and what it cost, by default by day, in this month. */
  get(query: UsageQuery = {}, options?: CallOptions): Promise<UsageReport> {
    return this.#transport.send({ method: "GET", path: "/usage", query: usageQuery(query) }, options);
  }

  /** Return the same as CSV. */
  csv(query: UsageQuery = {}, options?: CallOptions): Promise<string> {
    const call = { method: "GET", path: "/usage", query: { ...usageQuery(query), format: "csv" }, isText: true };
    return this.#transport.send(call, options);
  }
}

export class Lucid {
  readonly passports: Passports;
  readonly compute: Compute;
  readonly models: Models;
  readonly keys: Keys;
  readonly usage: Usage;
  readonly #transport: Transport;

  constructor(options: LucidOptions = {}) {
    this.#transport = new Transport(options);
    this.passports = new Passports(this.#transport);
    this.compute = new Compute(this.#transport);
    this.models = new Models(this.#transport);
    this.keys = new Keys(this.#transport);
    this.usage = new Usage(this.#transport);
  }

  get baseUrl(): string {
    return this.#transport.baseUrl;
  }

  /** Say which node a request would go to, and why the others would not get it. */
  match(request: MatchRequest, options?: CallOptions): Promise<Record<string, JsonValue>> {
    return this.#transport.send({ method: "POST", path: "/match", body: request }, options);
  }
}

function readResponse(call: Call, response: Response, text: string): unknown {
  const facts = { status: response.status, requestId: response.headers.get("x-request-id") };
  if (response.type === "opaqueredirect" || (response.status >= 300 && response.status < 400)) {
    throw new UnexpectedAnswer("The address redirects. Use the one that it leads to.", { ...facts, code: "REDIRECTED" });
  }
  if (response.ok) {
    if (call.isText || response.status === 204) {
      return call.isText ? text : undefined;
    }
    const found = parse(text);
    if (found === undefined) {
      throw notOurs(call, facts);
    }
    return found;
  }
  const retryAfterSeconds = readRetryAfter(response.headers.get("retry-after"));
  const body = parse(text) as { error?: { code?: unknown; message?: unknown; details?: unknown } } | null | undefined;
  const error = typeof body === "object" && body !== null ? body.error : undefined;
  if (typeof error !== "object" || error === null || typeof error.code !== "string") {
    if (response.status === 429 || (response.status >= 502 && response.status <= 504)) {
      const kind = BY_STATUS[response.status] ?? Unavailable;
      throw new kind(`HTTP ${response.status}, not from the service.`, { ...facts, code: "UNAVAILABLE", retryAfterSeconds });
    }
    throw notOurs(call, facts);
  }
  const details = (typeof error.details === "object" ? error.details : null) as Record<string, JsonValue> | null;
  const kind = error.code === "BUDGET_EXCEEDED" ? BudgetExceeded : (BY_STATUS[response.status] ?? ApiError);
  const message = String(error.message ?? "The service refused.");
  throw new kind(message, { ...facts, code: error.code, details: details ?? {}, retryAfterSeconds });
}

function notOurs(call: Call, facts: { status: number; requestId: string | null }): UnexpectedAnswer {
  const message = `The answer to ${call.method} ${call.path} is not the service's (HTTP ${facts.status}). Check baseUrl.`;
  return new UnexpectedAnswer(message, { ...facts, code: "UNEXPECTED_ANSWER" });
}

function parse(text: string): unknown {
  try {
    return JSON.parse(text);
  } catch {
    return undefined;
  }
}

/** Return how long to wait before the call is repeated; null if that would not help. */
function pauseAfter(error: unknown, attempt: number): number | null {
  const isTransient =
    error instanceof ConnectionFailed ||
    error instanceof TimedOut ||
    error instanceof Unavailable ||
    (error instanceof RateLimited && !(error instanceof BudgetExceeded));
  if (!isTransient) {
    return null;
  }
  const backOff = Math.min(FIRST_PAUSE_MS * 2 ** attempt, LONGEST_PAUSE_MS) * (0.5 + Math.random() / 2);
  const asked = (error as LucidError).retryAfterSeconds;
  if (asked === null) {
    return backOff;
  }
  return asked * 1000 > LONGEST_WAIT_MS ? null : Math.max(asked * 1000, backOff);
}

function readRetryAfter(value: string | null): number | null {
  if (value === null) {
    return null;
  }
  const seconds = /^\d+(\.\d+)?$/.test(value.trim()) ? Number(value) : (Date.parse(value) - Date.now()) / 1000;
  return Number.isFinite(seconds) ? Math.max(seconds, 0) : null;
}

function sleep(milliseconds: number, signal?: AbortSignal): Promise<void> {
  return new Promise((resolve, reject) => {
    const end = () => {
      clearTimeout(timer);
      reject(signal?.reason);
    };
    const timer = setTimeout(() => {
      signal?.removeEventListener("abort", end);
      resolve();
    }, milliseconds);
    if (signal?.aborted) {
      end();
    } else {
      signal?.addEventListener("abort", end, { once: true });
    }
  });
}

function pathOf(...parts: string[]): string {
  return parts.map((part) => `/${quote(part)}`).join("");
}

function quote(part: string): string {
  if (typeof part !== "string" || part === "" || part === "." || part === "..") {
    const message = `${JSON.stringify(part)} is no id or name. Pass the one that you mean.`;
    throw new InvalidRequest(message, { code: "INVALID_REQUEST" });
  }
  return encodeURIComponent(part);
}

function writeQuery(values: QueryValues = {}): string {
  const query = new URLSearchParams();
  for (const [name, value] of Object.entries(values)) {
    for (const each of Array.isArray(value) ? value : [value]) {
      if (each !== undefined && each !== null) {
        query.append(name, String(each));
      }
    }
  }
  const text = query.toString();
  return text && `?${text}`;
}

function usageQuery(query: UsageQuery): QueryValues {
  return { ...query, groupBy: query.groupBy?.join(",") };
}

function readUrl(text: string): string {
  let url: URL;
  try {
    url = new URL(text);
  } catch {
    throw new LucidError(`${JSON.stringify(text)} is no address. Pass one such as ${DEFAULT_URL}.`, { code: "CONFIGURATION" });
  }
  if (!/^https?:$/.test(url.protocol) || url.username || url.password || url.search || url.hash) {
    const message = "baseUrl has to be http:// or https://, a host and perhaps a path. A key belongs in apiKey.";
    throw new LucidError(message, { code: "CONFIGURATION" });
  }
  return url.href.replace(/\/+$/, "");
}

function readTimeout(milliseconds: number): number {
  if (!(milliseconds > 0)) {
    throw new LucidError("timeoutMs has to be more than 0.", { code: "CONFIGURATION" });
  }
  return Math.min(milliseconds, LONGEST_TIMER_MS);
}

/** Return an environment variable; undefined in browsers, and where it may not be read. */
function environment(name: string): string | undefined {
  try {
    const runtime = globalThis as { process?: { env?: Record<string, string | undefined> } };
    return runtime.process?.env?.[name] || undefined;
  } catch {
    return undefined;
  }
}

function reasonOf(error: unknown): string {
  const cause = error instanceof Error ? (error as { cause?: unknown }).cause : undefined;
  const code = (cause as { code?: unknown } | undefined)?.code;
  return typeof code === "string" ? code : error instanceof Error ? error.message : String(error);
}

/** Return a new idempotency key; Node 18 and pages without TLS have no `randomUUID`. */
function randomId(): string {
  const source = globalThis.crypto as Crypto | undefined;
  if (typeof source?.randomUUID === "function") {
    return source.randomUUID();
  }
  const bytes = source?.getRandomValues(new Uint8Array(16)) ?? Array.from({ length: 16 }, () => Math.random() * 256);
  return Array.from(bytes, (byte) => Math.floor(byte).toString(16).padStart(2, "0")).join("");
}
