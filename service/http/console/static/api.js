// The service's API. A key is kept in this module, so it goes with the page.

// The console's files are in `console/` under the address of the service, whatever that is.
const ROOT = new URL("..", import.meta.url);

/** Events: `gone` (the service does not answer, or is not ready; `detail` says why) and `key`. */
export const events = new EventTarget();

let key = null;
// Whether a person was asked and gave none. From then on only what they ask for themselves asks again.
let isDeclined = false;
let askForKey = async () => false;

/** Where the service's paths begin, without a slash at the end. */
export const address = ROOT.href.replace(/\/$/, "");

/** An error in the API's own words. */
export class ApiError extends Error {
  constructor(status, { type = "unknown", message = "", details = [] }, requestId, retryAfter = null) {
    super(message || `HTTP ${status}`);
    this.name = "ApiError";
    this.status = status;
    this.type = type;
    this.details = details;
    this.requestId = requestId;
    this.retryAfter = retryAfter;
  }
}

/** No answer at all. */
export class Unreachable extends Error {
  constructor() {
    super("The service does not answer.");
    this.name = "Unreachable";
  }
}

export const hasKey = () => key !== null;

/** Send another key from now on; null sends none. */
export function useKey(value) {
  key = value || null;
  isDeclined = false;
  events.dispatchEvent(new Event("key"));
}

/** How a person is asked for a key: `ask(error)` is true once there is another one. */
export function onKeyNeeded(ask) {
  let asking = null;
  askForKey = (error) => {
    // One dialog for all requests that wait for a key.
    asking ??= ask(error)
      .then((given) => {
        isDeclined = !given;
        return given;
      })
      .finally(() => (asking = null));
    return asking;
  };
}

/**
 * Send a request and return the response, whose status is a good one.
 *
 * options: `query` (an object; arrays repeat a name, null is left out), `body` (an object becomes
 * JSON, anything else is sent as it is), `headers`, `signal`, and `ask`: whether a person is asked for
 * a key: true (the person has asked for this), false, or "missing": only if there is no good one yet,
 * and they have not declined.
 *
 * Throws ApiError, Unreachable, or the AbortError of `signal`.
 */
export async function send(method, path, { query = {}, body, headers = {}, signal, ask = true } = {}) {
  const url = new URL(path.replace(/^\//, ""), ROOT);
  for (const [name, value] of Object.entries(query)) {
    for (const item of [value].flat()) if (item !== null && item !== undefined) url.searchParams.append(name, item);
  }
  const all = { ...headers };
  const isPlain = body !== null && typeof body === "object" && [Object.prototype, Array.prototype].includes(Object.getPrototypeOf(body));
  if (isPlain) all["Content-Type"] ??= "application/json";
  const sent = isPlain ? JSON.stringify(body) : body;
  for (;;) {
    const used = key;
    if (used !== null) all.Authorization = `Bearer ${used}`;
    let response;
    try {
      response = await (begun(method, url) ?? fetch(url, { method, headers: all, body: sent, signal, cache: "no-store", credentials: "same-origin" }));
    } catch (error) {
      if (error.name === "AbortError" || signal?.aborted) throw error;
      events.dispatchEvent(new CustomEvent("gone", { detail: null }));
      throw new Unreachable();
    }
    if (response.ok) return response;
    const error = await errorOf(response);
    if (error.status === 503) events.dispatchEvent(new CustomEvent("gone", { detail: error.message }));
    // 403 without a key is about where the request comes from: no key would change that.
    const isAboutKey = error.status === 401 || (error.status === 403 && used !== null && ask !== "missing");
    if (!isAboutKey || !ask || (ask === "missing" && isDeclined)) throw error;
    if (key === used && !(await askForKey(error))) throw error;
  }
}

/** What early.js has asked for already, once; undefined if this is another request. */
function begun(method, url) {
  if (method !== "GET" || key !== null || globalThis.begun?.url !== url.href) return undefined;
  const { answer } = globalThis.begun;
  delete globalThis.begun;
  return answer;
}

async function errorOf(response) {
  const requestId = response.headers.get("x-request-id");
  const retryAfter = Number(response.headers.get("retry-after")) || null;
  let content = {};
  try {
    content = (await response.json()).error ?? {};
  } catch {
    content = { message: `HTTP ${response.status} ${response.statusText}, without a message. A proxy in front of the service may have answered.` };
  }
  if (typeof content === "string") content = { message: content };
  return new ApiError(response.status, content, requestId, retryAfter);
}

/** The answer of GET as JSON. */
export const get = async (path, options) => json(await send("GET", path, options));
export const put = async (path, body, options) => json(await send("PUT", path, { ...options, body }));
export const post = async (path, body, options) => json(await send("POST", path, { ...options, body }));
export const del = async (path, options) => json(await send("DELETE", path, options));
export { del as delete };

async function json(response) {
  const text = await response.text();
  return text ? JSON.parse(text) : null;
}

/** Send lines of JSON and yield each line of the answer as it comes. */
export async function* lines(path, values, { query, signal } = {}) {
  const body = values.map((value) => `${JSON.stringify(value)}\n`).join("");
  const headers = { "Content-Type": "application/x-ndjson" };
  const response = await send("POST", path, { query, body, headers, signal });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) break;
      const parts = (rest + value).split("\n");
      rest = parts.pop();
      for (const part of parts) if (part) yield JSON.parse(part);
    }
  } catch (error) {
    if (error.name === "AbortError" || signal?.aborted || !(error instanceof TypeError)) throw error;
    events.dispatchEvent(new CustomEvent("gone", { detail: null }));
    throw new Unreachable();
  } finally {
    reader.cancel().catch(() => {});
  }
  if (rest) yield JSON.parse(rest);
}

/** Whether the service is ready: null, or why not. Asks nobody for anything. */
export async function notReady() {
  try {
    const response = await fetch(new URL("readyz", ROOT), { cache: "no-store", signal: AbortSignal.timeout(5000) });
    return response.ok ? null : ((await response.json()).reason ?? `HTTP ${response.status}`);
  } catch {
    return "The service does not answer.";
  }
}
