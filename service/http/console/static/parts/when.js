// Moments as people read them.

import { h } from "../dom.js";

const SHOWN = new Intl.DateTimeFormat("en-GB", { dateStyle: "medium", timeStyle: "short" });

/** A moment in ISO 8601, in the time zone of the browser; the exact one is its title. */
export function moment(text) {
  const date = new Date(text);
  return Number.isNaN(date.getTime()) ? String(text) : h("time", { datetime: text, title: text }, SHOWN.format(date));
}
