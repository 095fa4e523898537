// Adapters: a list that the service pages and searches, and one adapter in detail (`#/adapters/NAME`).

import * as api from "../api.js";
import { brief, bytes, calmly, count, counted, h, put, released } from "../dom.js";
import { errorBox } from "../shell.js";
import { detailPage } from "../parts/adapter.js";
import { sheet } from "../parts/sheet.js";
import { uploader } from "../parts/upload.js";

const PAGE = 50;
const STATES = ["ready", "incompatible", "damaged", "unloaded"];
const MOST_LABELS = 4;

export async function mount(root, params, context) {
  await sheet(new URL("adapters.css", import.meta.url).href);
  const [name] = params.path;
  return name ? detailPage(root, name, context) : listPage(root, params, context);
}

async function listPage(root, params, context) {
  // The cursors of the pages before this one: the service goes forward only.
  let behind = [];
  let cursor = null;
  let asking = null;

  const search = h("input", { type: "search", autocomplete: "off", spellcheck: "false", autocapitalize: "none", "data-search": true, value: params.query.get("search") ?? "", on: { input: calmly(restart, 150) } });
  const state = h(
    "select",
    { on: { change: restart } },
    h("option", { value: "" }, "any state"),
    STATES.map((value) => h("option", { value, selected: params.query.get("state") === value }, value)),
  );
  const found = h("p", { class: "muted", role: "status" });
  const trouble = h("div");
  const body = h("tbody");
  const table = h(
    "div",
    { class: "card scroll", tabindex: "0", role: "region", "aria-label": "Adapters" },
    h(
      "table",
      { class: "plain adapters" },
      h("thead", {}, h("tr", {}, h("th", { scope: "col" }, "name"), h("th", { scope: "col" }, "state"), h("th", { scope: "col", class: "roomy" }, "labels"), ["kind", "size", "trained", "revision"].map((column) => h("th", { scope: "col", class: "wide" }, column)))),
      body,
    ),
  );
  const back = h("button", { on: { click: () => { cursor = behind.pop() ?? null; load(); } } }, "Back");
  const next = h("button", { on: { click: () => { behind.push(cursor); cursor = next.dataset.cursor; load(); } } }, "Next");
  const pages = h("nav", { class: "row", "aria-label": "Pages of the list" }, back, next);
  const upload = uploader({ context, onChanged: load });

  put(
    root,
    h("h1", {}, "Adapters"),
    upload.element,
    h("div", { class: "row filters" }, h("label", { class: "grow" }, h("span", { class: "name" }, "Search by name"), search), h("label", {}, h("span", { class: "name" }, "State"), state)),
    found,
    trouble,
    table,
    pages,
  );
  api.events.addEventListener("back", load);
  await load();
  return () => {
    asking?.abort();
    upload.close();
    api.events.removeEventListener("back", load);
  };

  function restart() {
    behind = [];
    cursor = null;
    context.setQuery(Object.entries({ search: search.value.trim(), state: state.value }).filter(([, value]) => value));
    load();
  }

  async function load() {
    asking?.abort();
    asking = new AbortController();
    const { signal } = asking;
    table.setAttribute("aria-busy", "true");
    // A second click would skip a page that was never shown.
    back.disabled = next.disabled = true;
    try {
      const query = { limit: PAGE, cursor, search: search.value.trim() || null, state: state.value || null };
      const page = await api.get("v1/adapters", { query, signal });
      await released();
      if (signal.aborted) return;
      put(trouble);
      show(page);
    } catch (error) {
      if (error.name === "AbortError") return;
      put(trouble, errorBox(error, h("button", { on: { click: load } }, "Try again")));
      back.disabled = behind.length === 0;
    } finally {
      if (!signal.aborted) table.removeAttribute("aria-busy");
    }
  }

  function show({ adapters, next_cursor: following, total }) {
    const before = PAGE * behind.length;
    const isFiltered = search.value.trim() !== "" || state.value !== "";
    table.hidden = adapters.length === 0;
    pages.hidden = behind.length === 0 && following === null;
    back.disabled = behind.length === 0;
    next.disabled = following === null;
    next.dataset.cursor = following ?? "";
    put(body, adapters.map(row));
    if (total === 0) {
      found.textContent = isFiltered ? "No adapter is like this." : "There is no adapter yet. Drop a file above to publish the first one.";
    } else {
      found.textContent = adapters.length === total ? counted(total, "adapter") : `${count(before + 1)} to ${count(before + adapters.length)} of ${counted(total, "adapter")}`;
    }
  }
}

function row(adapter) {
  const { name, state, reason, labels, method, size, created, revision } = adapter;
  return h(
    "tr",
    {},
    h("th", { scope: "row" }, h("a", { href: `#/adapters/${encodeURIComponent(name)}` }, name)),
    h("td", {}, h("span", { class: `state ${state}` }, state), reason ? h("div", { class: "small muted clamp" }, reason) : null),
    h("td", { class: "roomy" }, labelsOf(labels)),
    h("td", { class: "wide" }, method ?? "–"),
    h("td", { class: "wide figure" }, size === null ? "–" : bytes(size)),
    h("td", { class: "wide" }, created ? created.slice(0, 10) : "–"),
    h("td", { class: "wide" }, h("code", { title: revision }, brief(revision))),
  );
}

function labelsOf(labels) {
  if (labels.length === 0) return "–";
  const more = labels.length - MOST_LABELS;
  return [labels.slice(0, MOST_LABELS).map((label) => [h("span", { class: "label" }, label), " "]), more > 0 ? h("span", { class: "muted" }, `and ${count(more)} more`) : null];
}
