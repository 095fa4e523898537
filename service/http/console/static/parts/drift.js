// Whether an adapter's texts are still like those that it was trained on, and which of them to label next.

import * as api from "../api.js";
import { count, counted, h, percent, put, score } from "../dom.js";
import { confirm, errorBox } from "../shell.js";
import { download as save } from "./files.js";
import { moment } from "./when.js";

const MEANINGS = { label: "which labels are given", confidence: "how sure the best label is", length: "how long texts are, in tokens", unknown: "share of tokens that the model does not know" };
const MOST_BINS = 20;

/** The two sections of an adapter's page; each says so where the service has nothing to show. */
export function driftSections(name, context) {
  const path = `v1/adapters/${encodeURIComponent(name)}`;
  return h("div", {}, section("Drift", (content) => drift(path, content, context)), section("Texts to label next", (content) => uncertain(path, content, context, name)));
}

function section(title, load) {
  const content = h("div", {}, h("p", { class: "muted" }, "Reading…"));
  const again = async () => {
    try {
      await load(content);
    } catch (error) {
      if (error.name !== "AbortError") put(content, errorBox(error, h("button", { on: { click: again } }, "Try again")));
    }
  };
  again();
  return h("section", { class: "card", "aria-label": title }, h("h2", {}, title), content);
}

async function drift(path, content, { signal }) {
  const found = await orNothing(api.get(`${path}/drift`, { signal, ask: false }));
  if (found === null) {
    put(content, h("p", { class: "muted" }, "This service does not measure drift for this adapter."));
    return;
  }
  const { texts, since, counting_since: began, quantities, note } = found;
  put(
    content,
    h("p", {}, `${counted(texts ?? 0, "text")} seen`, since ? [" since ", moment(since)] : null, ".", began ? [" The engine began to count ", moment(began), ", at zero."] : null),
    note ? h("p", { class: "muted" }, note) : null,
    quantities.map(quantity),
  );
}

function quantity({ quantity: name, psi, chance, level, bins }) {
  const highest = Math.max(0.001, ...bins.flatMap(({ reference, seen }) => [reference, seen]));
  const bar = (share, kind) => h("td", { class: "track" }, h("div", { class: `bar ${kind}`, style: { "--share": share / highest } }), h("span", { class: "figure" }, percent(share)));
  return h(
    "details",
    { open: level !== "stable" },
    h("summary", {}, `${name}: `, h("span", { class: `state ${level}` }, level), h("span", { class: "muted" }, ` · PSI ${score(psi)}${chance === undefined ? "" : `, by chance alone up to ${score(chance)}`}`)),
    h("p", { class: "small muted" }, MEANINGS[name] ?? name),
    h(
      "div",
      { class: "scroll", tabindex: "0", role: "region", "aria-label": `Drift of ${name}` },
      h(
        "table",
        { class: "plain drift" },
        h("thead", {}, h("tr", {}, ["", "in training", "seen now"].map((title) => (title ? h("th", { scope: "col" }, title) : h("td", {}))))),
        h("tbody", {}, bins.slice(0, MOST_BINS).map(({ bin, reference, seen }) => h("tr", {}, h("th", { scope: "row" }, bin), bar(reference, "reference"), bar(seen, "seen")))),
      ),
    ),
    bins.length > MOST_BINS ? h("p", { class: "small muted" }, `and ${count(bins.length - MOST_BINS)} more`) : null,
  );
}

async function uncertain(path, content, { signal }, name) {
  const found = await orNothing(api.get(`${path}/uncertain`, { signal, ask: false }));
  if (found === null) {
    put(content, h("p", { class: "muted" }, "This service keeps no texts of low confidence."));
    return;
  }
  const { texts } = found;
  if (!texts.length) {
    put(content, h("p", { class: "muted" }, "None yet. The texts of which the adapter is least certain appear here as they come."));
    return;
  }
  const trouble = h("div");
  put(
    content,
    h(
      "div",
      { class: "scroll sheet", tabindex: "0", role: "region", "aria-label": "Texts and their answers" },
      h(
        "table",
        { class: "plain" },
        h("thead", {}, h("tr", {}, ["text", "answer", "certainty", "seen"].map((title) => h("th", { scope: "col" }, title)))),
        h("tbody", {}, texts.map((item) => h("tr", {}, h("th", { scope: "row" }, item.text, item.cut ? " …" : null, item.text_pair ? h("div", { class: "muted" }, item.text_pair) : null), h("td", {}, item.answer), h("td", { class: "figure" }, score(item.certainty)), h("td", {}, moment(item.time))))),
      ),
    ),
    trouble,
    h("div", { class: "row" }, h("button", { on: { click: take } }, "Download as CSV"), h("button", { on: { click: forget } }, "Forget them")),
  );

  async function take() {
    try {
      const response = await api.send("GET", `${path}/uncertain`, { query: { format: "csv" }, signal });
      save(await response.blob(), `${name}-uncertain.csv`);
    } catch (error) {
      if (error.name !== "AbortError") put(trouble, errorBox(error));
    }
  }

  async function forget() {
    if (!(await confirm({ title: "Forget these texts?", body: "They are removed at once. New ones are kept as before.", action: "Forget", danger: true }))) return;
    try {
      await api.delete(`${path}/uncertain`);
      await uncertain(path, content, { signal }, name);
    } catch (error) {
      put(trouble, errorBox(error));
    }
  }
}

/** null where the service has no such thing, or has switched it off. */
async function orNothing(asked) {
  try {
    return await asked;
  } catch (error) {
    if (error.status === 404 || error.status === 405) return null;
    throw error;
  }
}
