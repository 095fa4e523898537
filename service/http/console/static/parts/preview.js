// The first records of a file, and which of its columns are the texts.

import { bytes, h, unique } from "../dom.js";

const SHOWN = 3;

/** found: of `look`. Returns `{element, text, pair}`; text and pair are names of columns, or null. */
export function preview(file, found) {
  const isTable = found.kind === "csv" || found.kind === "tsv";
  const text = columnChoice("Column of the texts", found.columns, found.text);
  const pair = columnChoice("Column of second texts", ["", ...found.columns], "");
  const head = isTable && h("thead", {}, h("tr", {}, found.columns.map((name) => h("th", { scope: "col" }, name))));
  const rows = found.records.slice(0, SHOWN).map((record) => h("tr", {}, cellsOf(record).map((cell) => h("td", {}, cell.slice(0, 160)))));
  return {
    element: h(
      "div",
      {},
      h("p", {}, h("strong", {}, file.name), h("span", { class: "muted" }, ` ${bytes(file.size)}`)),
      h("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "The first records" }, h("table", { class: "plain small" }, head, h("tbody", {}, rows))),
      found.columns.length ? h("div", { class: "row" }, text.element, pair.element) : null,
    ),
    get text() {
      return text.value || null;
    },
    get pair() {
      return pair.value || null;
    },
  };
}

function columnChoice(label, columns, value) {
  const id = unique("column");
  const select = h("select", { id }, columns.map((name) => h("option", { value: name, selected: name === value }, name || "none")));
  return {
    element: h("div", { class: "field" }, h("label", { for: id }, label), select),
    get value() {
      return select.value;
    },
  };
}

function cellsOf({ value, fault }) {
  if (fault && value === null) return [fault];
  if (Array.isArray(value)) return value;
  return [typeof value === "string" ? value : JSON.stringify(value)];
}
