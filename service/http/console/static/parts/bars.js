// A table of labels with bars, as scores and as counts.

import { h, soft } from "../dom.js";

/**
 * rows: `{label, share, figure, needed, isGiven}`. share: of the whole width, 0 to 1. needed: where a
 * threshold is drawn, or null. figure: how the number is written. caption: shown, or read aloud alone.
 */
export function bars(caption, rows, { isCaptionShown = false, unit = "score" } = {}) {
  return h(
    "table",
    { class: "bars" },
    h("caption", { class: isCaptionShown ? null : "hidden" }, caption),
    h("colgroup", {}, h("col", { class: "labels" }), h("col"), h("col", { class: "figures" })),
    h("thead", { class: "hidden" }, h("tr", {}, ["label", "bar", unit].map((name) => h("th", { scope: "col" }, name)))),
    h("tbody", {}, rows.map(row)),
  );
}

function row({ label, share = null, figure, needed = null, isGiven = false }) {
  return h(
    "tr",
    { class: isGiven ? "given" : null },
    h("th", { scope: "row" }, soft(label)),
    h(
      "td",
      { class: "track" },
      share === null ? null : h("div", { class: "bar", style: { "--share": share } }),
      needed === null ? null : h("div", { class: "needle", style: { "--share": needed.at }, title: `needs ${needed.figure}` }),
    ),
    h("td", { class: "figure" }, figure, needed === null ? null : h("span", { class: "hidden" }, `, needs ${needed.figure}`)),
  );
}
