// What every page has around it: notices, dialogs, the key, the theme, and whether the service is there.

import * as api from "./api.js";
import { h, put, unique } from "./dom.js";

const polite = h("div", { class: "hidden", role: "status", "aria-live": "polite" });
const assertive = h("div", { class: "hidden", role: "alert" });
const toasts = h("div", { class: "toasts", role: "region", "aria-label": "Notices" });
const banner = h("div", { class: "banner", hidden: true });

/** The elements of this module, for the end of the page; the banner has its own place. */
export const furniture = [polite, assertive, toasts];
export { banner };

/** Say something to screen readers alone; `urgent` interrupts what they say. */
export function announce(text, { urgent = false } = {}) {
  const region = urgent ? assertive : polite;
  // The same text again is only read if the region was empty in between.
  region.textContent = "";
  setTimeout(() => (region.textContent = text), 60);
}

/** A short notice that goes by itself. kind: "plain", "good" or "bad". */
export function toast(text, kind = "plain") {
  const shown = h("div", { class: `toast ${kind}` }, text);
  shown.append(
    h("button", { class: "quiet", "aria-label": "Close this notice", on: { click: () => shown.remove() } }, "×"),
  );
  toasts.append(shown);
  announce(text, { urgent: kind === "bad" });
  setTimeout(() => shown.remove(), kind === "bad" ? 12000 : 5000);
}

/**
 * An error where it happened: the API's own message, every detail, and the id under which the
 * service's log has it.
 */
export function errorBox(error, ...actions) {
  const details = (error.details ?? []).filter((detail) => !String(error.message).includes(detail));
  const facts = [
    error.status ? `${error.status} ${error.type}` : null,
    error.retryAfter ? `try again after ${error.retryAfter} s` : null,
  ].filter(Boolean);
  return h(
    "div",
    { class: "box bad", role: "alert" },
    h("p", { class: "strong" }, error.message || String(error)),
    details.length ? h("ul", {}, details.slice(0, 20).map((detail) => h("li", {}, detail))) : null,
    details.length > 20 ? h("p", {}, `and ${details.length - 20} more`) : null,
    facts.length || error.requestId
      ? h(
          "p",
          { class: "small muted" },
          facts.join(" · "),
          error.requestId ? [facts.length ? " · " : "", "request ", h("code", {}, error.requestId)] : null,
        )
      : null,
    actions.length ? h("div", { class: "row" }, actions) : null,
  );
}

/** A modal dialog; resolves with what `close` is called with, or with null. `content(close)` makes it. */
function dialog(title, content) {
  return new Promise((resolve) => {
    const id = unique("dialog");
    const element = h("dialog", { "aria-labelledby": id });
    let result = null;
    const close = (value = null) => {
      result = value;
      element.close();
    };
    element.append(h("h2", { id }, title), ...[content(close)].flat());
    element.addEventListener("close", () => {
      element.remove();
      resolve(result);
    });
    element.addEventListener("click", (event) => {
      if (event.target === element) close();
    });
    document.body.append(element);
    element.showModal();
    element.querySelector("[autofocus]")?.focus();
  });
}

/**
 * Ask before something is done. `typed`: a word that must be typed first, for what cannot be undone.
 * Resolves with true or false.
 */
export async function confirm({ title, body, action = "Go on", danger = false, typed = null }) {
  const done = await dialog(title, (close) => {
    const go = h("button", { class: danger ? "danger" : "primary", type: "submit", disabled: typed !== null }, action);
    const word = typed === null ? null : h("input", {
      type: "text", autocomplete: "off", spellcheck: "false", autofocus: true,
      on: { input: (event) => (go.disabled = event.target.value !== typed) },
    });
    return h(
      "form",
      { on: { submit: (event) => { event.preventDefault(); close(true); } } },
      typeof body === "string" ? h("p", {}, body) : body,
      word && h("label", { class: "field" }, h("span", {}, "Type ", h("strong", {}, typed), " to go on"), word),
      h(
        "div",
        { class: "row end" },
        h("button", { type: "button", autofocus: typed === null, on: { click: () => close(false) } }, "Cancel"),
        go,
      ),
    );
  });
  return done === true;
}

/** Ask for a key. `error`: why, in the API's words; null if the person asked. */
async function askForKey(error) {
  const value = await dialog("A key is needed", (close) => {
    const input = h("input", { type: "password", autocomplete: "off", spellcheck: "false", autofocus: true });
    const show = h("input", { type: "checkbox", on: { change: () => (input.type = show.checked ? "text" : "password") } });
    return h(
      "form",
      { on: { submit: (event) => { event.preventDefault(); if (input.value.trim()) close(input.value.trim()); } } },
      error && errorBox(error),
      h("label", { class: "field" }, h("span", {}, "Key"), input),
      h("label", { class: "check" }, show, "show it"),
      h("p", { class: "small muted" }, "It is kept in the memory of this page and goes when you close or reload it. It is sent to this service alone."),
      h(
        "div",
        { class: "row end" },
        api.hasKey() ? h("button", { type: "button", class: "quiet", on: { click: () => close("") } }, "Forget the key") : null,
        h("button", { type: "button", on: { click: () => close() } }, "Cancel"),
        h("button", { class: "primary", type: "submit" }, "Use this key"),
      ),
    );
  });
  if (value === null) return false;
  api.useKey(value);
  if (!value) announce("The key was forgotten.");
  return value !== "";
}

api.onKeyNeeded(askForKey);

/** The button in the header that says whether there is a key, and asks for one. */
export function keyButton() {
  const button = h("button", { class: "quiet", on: { click: () => askForKey(null) } });
  const show = () => {
    button.textContent = api.hasKey() ? "Key: set" : "Key";
    button.title = api.hasKey() ? "Use another key, or forget this one" : "Use a key";
  };
  api.events.addEventListener("key", show);
  show();
  return button;
}

const THEMES = ["system", "light", "dark"];

/** The button that goes round system, light and dark; the browser keeps the choice. */
export function themeButton() {
  const root = document.documentElement;
  const button = h("button", { class: "quiet", title: "Light, dark, or as the system says" });
  const show = () => (button.textContent = `Theme: ${root.dataset.theme ?? "system"}`);
  button.addEventListener("click", () => {
    const next = THEMES[(THEMES.indexOf(root.dataset.theme ?? "system") + 1) % THEMES.length];
    if (next === "system") delete root.dataset.theme;
    else root.dataset.theme = next;
    try {
      localStorage.setItem("idspam.theme", next);
    } catch {
      // Not kept, but in force.
    }
    show();
    announce(button.textContent);
  });
  show();
  return button;
}

const WAITS = [1, 1, 2, 4, 8];
let isWatching = false;

/** Show the banner until the service is ready again, and look by itself. Pages hear `back`. */
async function watchService() {
  if (isWatching) return;
  isWatching = true;
  let wake = () => {};
  const retry = h("button", { on: { click: () => wake() } }, "Try now");
  for (let turn = 0; ; turn += 1) {
    const reason = await api.notReady();
    if (reason === null) break;
    const text = reason.startsWith("The service") ? reason : `The service is not ready: ${reason}`;
    if (banner.hidden || banner.dataset.text !== text) {
      banner.dataset.text = text;
      put(banner, h("span", { role: "alert" }, text, " This page goes on once it does."), retry);
      banner.hidden = false;
    }
    await new Promise((resolve) => {
      wake = resolve;
      setTimeout(resolve, 1000 * WAITS[Math.min(turn, WAITS.length - 1)]);
    });
  }
  isWatching = false;
  if (!banner.hidden) {
    banner.hidden = true;
    toast("The service answers again.", "good");
    api.events.dispatchEvent(new Event("back"));
  }
}

api.events.addEventListener("gone", watchService);

/** Resolves once the service is ready. */
export async function untilBack(signal) {
  while ((await api.notReady()) !== null) {
    await new Promise((resolve) => setTimeout(resolve, 1000));
    signal?.throwIfAborted();
  }
}

/** The dialog that lists the shortcuts, and switches single keys off. */
export function showShortcuts(rows, singleKeys) {
  return dialog("Keyboard", (close) => {
    const isOn = h("input", { type: "checkbox", checked: singleKeys.on, on: { change: () => singleKeys.set(isOn.checked) } });
    return [
      h(
        "table",
        { class: "plain" },
        h("tbody", {}, rows.map(([keys, what]) => h("tr", {}, h("td", {}, keys.map((name, at) => [at ? " then " : null, h("kbd", {}, name)])), h("td", {}, what)))),
      ),
      h("label", { class: "check" }, isOn, "shortcuts of single keys"),
      h("div", { class: "row end" }, h("button", { class: "primary", autofocus: true, on: { click: () => close() } }, "Close")),
    ];
  });
}

/** Put a text on the clipboard, also where the page has no secure address. */
export async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    const field = h("textarea", { class: "hidden", value: text, "aria-hidden": "true" });
    document.body.append(field);
    field.select();
    const done = document.execCommand("copy");
    field.remove();
    if (!done) {
      toast("The browser did not allow copying: select the text instead.", "bad");
      return;
    }
  }
  toast("Copied.", "good");
}
