// What differs between two files, as the API says it, in a table.

import { bytes, counted, h, percent } from "../dom.js";

// Fields of the spec that people know by another name.
const NAMES = {
  kind: "kind",
  size: "size of the file",
  activation: "several labels a text",
  max_length: "most tokens of a text",
  "calibration.temperature": "temperature",
  "decision.abstain_below": "abstains below",
  "decision.precision": "precision it abstains for",
  "decision.coverage": "coverage table",
  "backbone.name": "backbone",
  "backbone.revision": "revision of the backbone",
  "backbone.fingerprint": "fingerprint of the backbone",
  "prompt.length": "length of the prompt",
  "prompt.layer": "layer of the prompt",
  "tuning.layers": "tuned layers",
  "provenance.data": "trained on",
  "provenance.data_sha256": "sha256 of the data",
  "provenance.data_licence": "licence of the data",
  "provenance.command": "command",
  "provenance.code_version": "version of the code",
  "provenance.created": "trained",
};
const MOST_LABELS = 30;
const MOST_ROWS = 60;

/** Whether anything at all differs. */
export function differs(difference) {
  const { labels, thresholds, fields, figures, tables } = difference;
  return Boolean(labels.added.length || labels.removed.length || labels.reordered || thresholds.length || fields.length || figures.length || tables.length);
}

/** The difference as a table. before, after: what the two sides are called. */
export function changes(difference, { before = "served now", after = "this file" } = {}) {
  if (!differs(difference)) return h("p", {}, "They declare the same. Only their weights differ.");
  const { labels, thresholds, fields, figures, tables } = difference;
  const rows = [
    ...fields.map((change) => row(NAMES[change.field] ?? change.field, shown(change.field, change.before), shown(change.field, change.after))),
    ...figures.map((change) => row(change.field, number(change.before), number(change.after), trend(change))),
    ...thresholds.map((change) => row(`threshold of ${change.field}`, number(change.before), number(change.after))),
  ];
  const more = rows.length - MOST_ROWS;
  return h(
    "div",
    { class: "changes" },
    labels.added.length ? labelLine("Labels added", labels.added, "good") : null,
    labels.removed.length ? labelLine("Labels removed", labels.removed, "bad") : null,
    labels.reordered ? h("p", {}, h("strong", {}, "Labels in another order.")) : null,
    rows.length
      ? h(
          "div",
          { class: "scroll", tabindex: "0", role: "region", "aria-label": "What differs" },
          h(
            "table",
            { class: "plain" },
            h("thead", {}, h("tr", {}, ["", before, after, ""].map((name) => (name ? h("th", { scope: "col" }, name) : h("td", {}))))),
            h("tbody", {}, rows.slice(0, MOST_ROWS)),
          ),
        )
      : null,
    more > 0 ? h("p", { class: "small muted" }, `and ${counted(more, "more difference")}`) : null,
    tables.length ? h("p", {}, `Also different: ${tables.map((name) => NAMES[name] ?? name).join(", ")}.`) : null,
  );
}

/** Labels as a line that stays short. */
export function labelLine(title, labels, kind = "") {
  return h(
    "p",
    {},
    h("strong", {}, `${title}: `),
    labels.slice(0, MOST_LABELS).map((label) => [h("span", { class: `label ${kind}` }, label), " "]),
    labels.length > MOST_LABELS ? h("span", { class: "muted" }, `and ${labels.length - MOST_LABELS} more`) : null,
  );
}

function row(name, before, after, note = null) {
  return h("tr", {}, h("th", { scope: "row" }, name), h("td", {}, before), h("td", {}, after), h("td", { class: "figure" }, note));
}

function shown(field, value) {
  if (value === null) return "–";
  if (field === "size") return bytes(value);
  if (field === "activation") return value === "sigmoid" ? "yes" : "no";
  if (field === "tuning.layers") return `${value[0] + 1} to ${value[1]}`;
  if (Array.isArray(value)) return value.join(", ");
  if (typeof value === "number") return number(value);
  if (typeof value === "boolean") return value ? "yes" : "no";
  return /^[0-9a-f]{64}$/.test(value) ? h("code", { title: value }, `${value.slice(0, 12)}…`) : String(value);
}

/** A figure with four digits. */
export function number(value) {
  if (value === null || value === undefined) return "–";
  return Number.isInteger(value) ? value.toLocaleString("en") : value.toLocaleString("en", { maximumSignificantDigits: 4 });
}

function trend({ before, after }) {
  if (typeof before !== "number" || typeof after !== "number") return null;
  const by = after - before;
  const share = before ? ` (${by > 0 ? "+" : "−"}${percent(Math.abs(by / before))})` : "";
  return `${by > 0 ? "+" : "−"}${number(Math.abs(by))}${share}`;
}
