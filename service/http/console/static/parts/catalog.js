// What the console knows about adapters: one request for each name, until it is found to be old.

import * as api from "../api.js";

const known = new Map();

/** The name of a reference: `sms-spam` of `sms-spam@0c9d`. */
export const nameOf = (reference) => reference.split("@", 1)[0];

/** The adapter as GET /v1/adapters/{name} shows it, or null if this key may not see it. */
export function detail(name) {
  if (!known.has(name)) {
    const asked = api.get(`v1/adapters/${encodeURIComponent(name)}`, { ask: "missing" }).catch((error) => {
      known.delete(name);
      if (error.status === 403 || error.status === 404) return null;
      throw error;
    });
    known.set(name, asked);
  }
  return known.get(name);
}

/** Ask again the next time: the adapter has changed. */
export function forget(name) {
  known.delete(name);
}

/** The spec of the revision that answered, asked for again if another one is known; null if it is not the current one. */
export async function specOf(name, revision) {
  let found = await detail(name);
  if (found !== null && found.revision !== revision) {
    forget(name);
    found = await detail(name);
  }
  return found?.revision === revision ? found.spec : null;
}

api.events.addEventListener("key", () => known.clear());
