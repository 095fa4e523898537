// A page's own style sheet, loaded with the page: the first page does not wait for it.

import { h } from "../dom.js";

const loaded = new Map();

/** Resolves once the sheet is in force, or could not be loaded: a page without it can be read. */
export function sheet(address) {
  if (!loaded.has(address)) {
    loaded.set(
      address,
      new Promise((resolve) => {
        const failed = () => {
          loaded.delete(address);
          resolve();
        };
        document.head.append(h("link", { rel: "stylesheet", href: address, on: { load: resolve, error: failed } }));
      }),
    );
  }
  return loaded.get(address);
}
