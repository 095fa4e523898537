// A small line chart: an SVG drawing, its legend with the newest values, and the same numbers as a table.

import { h, put, s, unique } from "../dom.js";

const WIDTH = 300;
const HEIGHT = 100;
const MOST_ROWS = 20;

/**
 * A chart of a few lines over time.
 *
 * lines: names. format: a value as text. note: a sentence below. `update(times, rows)` draws: times in
 * seconds before now, the oldest first; rows a list of numbers (null: nothing) for each line.
 */
export function lineChart({ title, lines, format, note = null }) {
  const id = unique("chart");
  const paths = lines.map((_, at) => s("path", { class: `line line-${at}` }));
  const needle = s("line", { class: "reading", y1: 0, y2: HEIGHT, visibility: "hidden" });
  const drawing = s(
    "svg",
    { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", role: "img", "aria-labelledby": id, on: { pointermove: point, pointerleave: leave } },
    [0, 0.5, 1].map((share) => s("line", { class: "grid", x1: 0, x2: WIDTH, y1: share * HEIGHT, y2: share * HEIGHT })),
    paths,
    needle,
  );
  const summary = h("span", { id, class: "hidden" }, `${title}: nothing measured yet`);
  const top = h("span", {});
  const from = h("span", {});
  const values = lines.map(() => h("span", { class: "figure" }, "–"));
  const reading = h("span", { class: "small muted" }, "now");
  const table = h("tbody");
  const numbers = h(
    "details",
    { class: "small", on: { toggle: () => showTable() } },
    h("summary", {}, "Numbers"),
    h(
      "div",
      { class: "scroll", tabindex: "0", role: "region", "aria-label": `${title}: numbers` },
      h("table", { class: "plain" }, h("thead", {}, h("tr", {}, h("th", { scope: "col" }, "when"), lines.map((name) => h("th", { scope: "col" }, name)))), table),
    ),
  );
  let drawn = { times: [], rows: lines.map(() => []) };

  const element = h(
    "section",
    { class: "card chart", "aria-label": title },
    h("h2", {}, title),
    h("ul", { class: "legend" }, lines.map((name, at) => h("li", {}, s("svg", { class: "key", viewBox: "0 0 24 8", "aria-hidden": "true" }, s("path", { class: `line line-${at}`, d: "M0 4H24" })), ` ${name} `, values[at])), h("li", {}, reading)),
    h("div", { class: "plot" }, h("div", { class: "axis", "aria-hidden": "true" }, top, h("span", {}, "0")), drawing),
    h("div", { class: "times small muted", "aria-hidden": "true" }, from, h("span", {}, "now")),
    summary,
    note ? h("p", { class: "small muted" }, note) : null,
    numbers,
  );

  function update(times, rows) {
    drawn = { times, rows };
    const known = rows.flat().filter((value) => value !== null && Number.isFinite(value));
    const highest = nice(Math.max(0, ...known));
    const longest = Math.max(1, ...times);
    top.textContent = format(highest);
    from.textContent = ago(longest);
    paths.forEach((path, at) => path.setAttribute("d", pathOf(times, rows[at], longest, highest)));
    show(times.length - 1);
    leave();
    summary.textContent = known.length ? `${title}, ${ago(longest)} until now: ${lines.map((name, at) => inWords(name, rows[at])).join("; ")}` : `${title}: nothing measured in this time`;
    showTable();
  }

  function inWords(name, row) {
    const known = row.filter((value) => value !== null);
    if (!known.length) return `${name}: nothing`;
    return `${name}: now ${format(row.at(-1))}, at least ${format(Math.min(...known))}, at most ${format(Math.max(...known))}`;
  }

  function show(at) {
    values.forEach((value, line) => (value.textContent = format(drawn.rows[line]?.[at] ?? null)));
  }

  function point(event) {
    const { left, width } = drawing.getBoundingClientRect();
    const longest = Math.max(1, ...drawn.times);
    const wanted = longest * (1 - (event.clientX - left) / width);
    let nearest = -1;
    for (const [at, time] of drawn.times.entries()) {
      if (nearest < 0 || Math.abs(time - wanted) < Math.abs(drawn.times[nearest] - wanted)) nearest = at;
    }
    if (nearest < 0) return;
    const x = WIDTH * (1 - drawn.times[nearest] / longest);
    needle.setAttribute("x1", x);
    needle.setAttribute("x2", x);
    needle.setAttribute("visibility", "visible");
    reading.textContent = drawn.times[nearest] < 1 ? "now" : ago(drawn.times[nearest]);
    show(nearest);
  }

  function leave() {
    needle.setAttribute("visibility", "hidden");
    reading.textContent = "now";
    show(drawn.times.length - 1);
  }

  function showTable() {
    if (!numbers.open) return;
    const last = drawn.times.length - 1;
    const places = [...drawn.times.keys()].reverse().slice(0, MOST_ROWS);
    put(
      table,
      places.map((at) => h("tr", {}, h("th", { scope: "row" }, at === last ? "now" : ago(drawn.times[at])), drawn.rows.map((row) => h("td", { class: "figure" }, format(row[at]))))),
    );
  }

  return { element, update };
}

function pathOf(times, row, longest, highest) {
  let path = "";
  let isDrawing = false;
  for (const [at, value] of row.entries()) {
    if (value === null || !Number.isFinite(value)) {
      isDrawing = false;
      continue;
    }
    const x = (WIDTH * (1 - times[at] / longest)).toFixed(1);
    const y = (HEIGHT * (1 - value / highest)).toFixed(1);
    // A point without neighbours is drawn as a dot: a line of no length with round ends.
    path += isDrawing ? `L${x} ${y}` : `M${x} ${y}h0`;
    isDrawing = true;
  }
  return path;
}

/** The next number of 1, 2, 5, 10, ... that is not smaller. */
export function nice(value) {
  if (!(value > 0)) return 1;
  const power = 10 ** Math.floor(Math.log10(value));
  // Rounding errors must not make 0.30000000000000004 of 0.3.
  return [1, 2, 3, 5, 10].map((step) => Number((step * power).toPrecision(6))).find((step) => step >= value * 0.9999);
}

/** 90 -> "90 s ago", 600 -> "10 min ago" */
export function ago(seconds) {
  if (seconds < 100) return `${Math.round(seconds)} s ago`;
  return `${Math.round(seconds / 60)} min ago`;
}
