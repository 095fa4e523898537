// How far a job is, with its rate, what it waits for, and a button that ends it.

import { count, counted, duration, h } from "../dom.js";

/** total: bytes of the file. Returns `{element, step(texts, bytes), wait(why), seconds}`. */
export function progress({ label, total, onCancel }) {
  const began = performance.now();
  const bar = h("progress", { max: total || 1, value: 0, "aria-label": label });
  const line = h("p", { class: "small muted" }, "Reading");
  const waiting = h("p", { class: "small strong", role: "status" });
  const cancel = h("button", { type: "button", on: { click: onCancel } }, "Cancel");
  const seconds = () => (performance.now() - began) / 1000;
  return {
    element: h("div", {}, bar, line, waiting, h("div", { class: "row" }, cancel)),
    step(texts, taken) {
      bar.value = taken;
      line.textContent = `${counted(texts, "text")}, ${count(Math.round(texts / seconds()))} a second${left(taken / total, seconds())}`;
    },
    /** null: it goes on. */
    wait(why) {
      waiting.textContent = why ? `${why} Waiting for the service.` : "";
    },
    get seconds() {
      return seconds();
    },
  };
}

function left(share, seconds) {
  return share > 0 && share < 1 && seconds > 2 ? `, about ${duration((seconds * (1 - share)) / share)} left` : "";
}
