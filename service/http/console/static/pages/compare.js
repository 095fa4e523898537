// Compare: two adapters, or two revisions of one, on the same texts. Where they disagree comes first.

import { brief, count, counted, h, percent, put, score, soft, unique } from "../dom.js";
import { announce, errorBox } from "../shell.js";
import { answerOf } from "../parts/answer.js";
import { detail, forget, nameOf } from "../parts/catalog.js";
import { dropArea } from "../parts/droparea.js";
import { ACCEPTED, Output, csvLine, download, fieldOf, look, read } from "../parts/files.js";
import { job } from "../parts/job.js";
import { adapterPicker, shown } from "../parts/picker.js";
import { preview } from "../parts/preview.js";
import { progress } from "../parts/progress.js";
import { textField } from "../parts/textfield.js";

const MOST_TEXTS = 20_000;
const ROWS = 50;
const DIRECTIONS = 8;
const CUT = 280;
const LABELS_KEPT = 3;

let kept = "";

export async function mount(root, params, context) {
  let running = null;
  let file = null;

  const sides = ["A", "B"].map((letter) => side(letter, params.query.get(letter.toLowerCase()), keepChoice));
  const text = textField({
    label: "Texts, one on each line", rows: 7, value: kept, placeholder: "Paste texts", limit: 200_000, offer: "Use it as a file",
    onTooLong: (pasted) => useFile(pasted),
  });
  text.input.addEventListener("input", () => (kept = text.value));
  const fileStage = h("div");
  const area = dropArea({ label: "Or drop a file", hint: `.txt, .csv, .tsv or .jsonl, also .gz; the first ${count(MOST_TEXTS)} texts`, accept: ACCEPTED, onFiles: ([file]) => useFile(file) });
  const send = h("button", { class: "primary", type: "submit", "data-send": true }, "Compare");
  const trouble = h("div");
  const results = h("div");

  put(
    root,
    h("h1", {}, "Compare"),
    h(
      "form",
      { class: "card", "aria-label": "What to compare", on: { submit: (event) => { event.preventDefault(); compare(); } } },
      h("div", { class: "columns even" }, sides.map(({ element }) => element)),
      h("div", { class: "columns even" }, text.element, h("div", {}, area, fileStage)),
      trouble,
      h("div", { class: "row" }, send),
    ),
    results,
  );

  function keepChoice() {
    context.setQuery(sides.map(({ letter, reference }) => [letter.toLowerCase(), reference]).filter(([, reference]) => reference));
  }

  async function useFile(dropped) {
    file = null;
    try {
      const found = await look(dropped);
      const choice = preview(dropped, found);
      file = { file: dropped, choice };
      put(fileStage, choice.element, h("button", { type: "button", on: { click: () => { file = null; put(fileStage); } } }, "Remove the file"));
    } catch (error) {
      put(fileStage, errorBox(error));
    }
  }

  async function compare() {
    const chosen = sides.map(({ reference }) => reference);
    put(trouble);
    if (chosen.some((reference) => !reference)) {
      put(trouble, errorBox({ message: "Choose two adapters, or one adapter twice with two revisions." }));
      return;
    }
    if (!file && !text.value.trim()) {
      put(trouble, errorBox({ message: "Paste texts, or drop a file." }));
      return;
    }
    const source = file ?? { file: new File([text.value], "texts.txt"), choice: { text: null, pair: null } };
    running?.abort();
    const controller = (running = new AbortController());
    const { signal } = controller;
    const shownProgress = progress({ label: "Comparing", total: source.file.size, onCancel: () => controller.abort() });
    put(results, h("div", { class: "card" }, shownProgress.element));
    const tally = { rows: [], failed: [], read: 0, isCut: false };
    let ended = null;
    let pair = null;
    try {
      pair = await Promise.all(chosen.map(pinned));
      const records = some(read(source.file, { signal, onBytes: (taken) => (tally.read = taken) }), tally);
      const linesOf = (record) => requestLines(record, source.choice, pair);
      for await (const { item, answers } of job(records, linesOf, { signal, onWait: shownProgress.wait })) {
        take(item, answers, source.choice, tally);
        shownProgress.step(tally.rows.length + tally.failed.length, tally.read);
      }
    } catch (error) {
      ended = error;
    }
    if (running !== controller) return;
    running = null;
    const wasCancelled = ended?.name === "AbortError";
    put(results, ended && !wasCancelled ? errorBox(ended) : null, tally.rows.length || tally.failed.length ? findings(tally, pair, wasCancelled) : null);
    const disagreements = tally.rows.filter(({ agree }) => !agree).length;
    announce(`${counted(tally.rows.length, "text")} compared, ${count(disagreements)} disagreements`);
  }

  return () => {
    running?.abort();
    running = null;
  };
}

/** One adapter with one of its revisions. */
function side(letter, value, onChange) {
  const select = h("select", { id: unique("revision"), on: { change: onChange } });
  // Always there, so that nothing moves when its options come.
  const revisions = h("div", { class: "field" }, h("label", { for: select.id }, "Revision"), select);
  const picker = adapterPicker({ label: `Adapter ${letter}`, value: value ? [nameOf(value)] : [], onChange: () => { show(null); onChange(); } });
  const element = h("div", {}, picker.element, revisions);

  async function show(revision) {
    const [reference] = picker.value;
    put(select, h("option", { value: "" }, reference?.includes("@") ? "as typed" : "current"));
    select.disabled = true;
    if (!reference || reference.includes("@")) return;
    const found = await detail(reference).catch(() => null);
    if (picker.value[0] !== reference || !found || found.revisions.length < 2) return;
    put(
      select,
      h("option", { value: "" }, `current (${brief(found.revision)})`),
      found.revisions.filter((item) => item !== found.revision).map((item) => h("option", { value: item, selected: revision && item.startsWith(revision) }, brief(item))),
    );
    select.disabled = false;
    onChange();
  }

  show(value?.split("@")[1] ?? null);
  return {
    letter,
    element,
    get reference() {
      const [name] = picker.value;
      return name && select.value ? `${name}@${select.value}` : (name ?? null);
    },
  };
}

/** A reference that means the same revision until the end, and what is known about it. */
async function pinned(reference) {
  const name = nameOf(reference);
  forget(name);
  const found = await detail(name);
  const isCurrent = !reference.includes("@");
  return { reference: isCurrent && found?.revision ? `${name}@${found.revision}` : reference, labels: found?.labels ?? null, isCurrent };
}

async function* some(records, tally) {
  let number = 0;
  for await (const record of records) {
    if (number === MOST_TEXTS) {
      tally.isCut = true;
      return;
    }
    number += 1;
    yield record;
  }
}

function requestLines(record, choice, pair) {
  const text = fieldOf(record, choice.text);
  if (record.fault === undefined && text === undefined) record.fault = `no text in “${choice.text}”`;
  if (record.fault !== undefined) return [];
  const second = choice.pair ? fieldOf(record, choice.pair) : undefined;
  return pair.map(({ reference }) => ({ text, ...(second === undefined ? {} : { text_pair: second }), adapter: reference, top_k: LABELS_KEPT }));
}

function take(record, answers, choice, tally) {
  const fault = record.fault ?? answers.find(({ error }) => error)?.error.message;
  if (fault !== undefined) {
    tally.failed.push(`line ${record.line}: ${fault}`);
    return;
  }
  const [a, b] = answers;
  const [said, other] = answers.map(setOf);
  tally.rows.push({ line: record.line, text: fieldOf(record, choice.text), a, b, agree: said === other });
}

/** An answer as something to compare: the order of a set of labels says nothing. */
function setOf(result) {
  return result.labels ? JSON.stringify(result.labels.toSorted()) : answerOf(result);
}

/** Disagreements first, those first of which both are sure; then agreements, the largest difference first. */
function order(rows) {
  const sure = ({ a, b }) => Math.min(a.score, b.score);
  const apart = ({ a, b }) => Math.abs(a.score - b.score);
  return rows.toSorted((one, two) => one.agree - two.agree || (one.agree ? apart(two) - apart(one) : sure(two) - sure(one)));
}

function findings(tally, pair, wasCancelled) {
  const rows = order(tally.rows);
  const apart = rows.filter(({ agree }) => !agree);
  const common = pair?.[0].labels && pair?.[1].labels ? pair[0].labels.some((label) => pair[1].labels.includes(label)) : true;
  const names = pair.map(({ reference }) => shown(reference));
  let filter = apart.length ? "apart" : "all";
  let most = ROWS;
  const list = h("ol", { class: "rows" });
  const more = h("button", { type: "button", on: { click: () => { most += ROWS; show(); } } });
  const tabs = [["apart", `Disagreements (${count(apart.length)})`], ["all", `All texts (${count(rows.length)})`]].map(([id, title]) =>
    h("button", { type: "button", "aria-pressed": "false", data: { id }, on: { click: () => { filter = id; most = ROWS; show(); } } }, title),
  );
  function show() {
    const chosen = filter === "apart" ? apart : rows;
    put(list, chosen.slice(0, most).map((row) => rowOf(row, names)));
    more.hidden = chosen.length <= most;
    more.textContent = `Show ${count(Math.min(ROWS, chosen.length - most))} more`;
    for (const tab of tabs) tab.setAttribute("aria-pressed", String(tab.dataset.id === filter));
  }
  show();
  return h(
    "section",
    { class: "card", "aria-label": "What was found" },
    h("p", { class: "headline" }, h("strong", {}, count(apart.length)), ` of ${counted(rows.length, "text")} get another answer`, rows.length ? ` (${percent(apart.length / rows.length)})` : null, wasCancelled ? ", when it was cancelled." : "."),
    common ? null : h("p", { class: "box warn" }, "These two have no label in common, so no answer can be the same."),
    tally.isCut ? h("p", { class: "box warn" }, `Only the first ${count(MOST_TEXTS)} texts of the file were compared.`) : null,
    tally.failed.length ? h("div", { class: "box warn" }, h("p", {}, `${counted(tally.failed.length, "text")} could not be answered by both.`), h("ul", {}, tally.failed.slice(0, 5).map((fault) => h("li", {}, fault)))) : null,
    directions(apart, names),
    h("div", { class: "row spread" }, h("div", { class: "row pressed" }, tabs), h("button", { type: "button", on: { click: () => download(asFile(rows, names), "comparison.csv") } }, "Download all as CSV")),
    list,
    rows.length ? null : h("p", { class: "muted" }, "No text was compared."),
    more,
  );
}

function directions(apart, names) {
  const counts = new Map();
  for (const { a, b } of apart) {
    const key = JSON.stringify([answerOf(a), answerOf(b)]);
    counts.set(key, (counts.get(key) ?? 0) + 1);
  }
  const sorted = [...counts].sort((one, two) => two[1] - one[1]);
  if (!sorted.length) return null;
  const rest = sorted.length - DIRECTIONS;
  return h(
    "div",
    { class: "scroll", tabindex: "0", role: "region", "aria-label": "Kinds of disagreement" },
    h(
      "table",
      { class: "plain small" },
      h("thead", {}, h("tr", {}, h("th", { scope: "col" }, "A: ", names[0]), h("th", { scope: "col" }, "B: ", names[1]), h("th", { scope: "col", class: "figure" }, "texts"))),
      h(
        "tbody",
        {},
        sorted.slice(0, DIRECTIONS).map(([key, texts]) => h("tr", {}, JSON.parse(key).map((label) => h("td", {}, soft(label))), h("td", { class: "figure" }, count(texts)))),
        rest > 0 ? h("tr", {}, h("td", { colspan: 2, class: "muted" }, counted(rest, "other kind")), h("td", { class: "figure" }, count(sorted.slice(DIRECTIONS).reduce((sum, [, texts]) => sum + texts, 0)))) : null,
      ),
    ),
  );
}

function rowOf({ line, text, a, b, agree }, names) {
  const long = text.length > CUT;
  return h(
    "li",
    { class: agree ? "agree" : "apart" },
    h("div", { class: "said" }, h("span", { class: "small muted" }, `line ${count(line)} `), long ? h("details", {}, h("summary", {}, `${text.slice(0, CUT)}…`), text) : text || h("span", { class: "muted" }, "(an empty text)")),
    [a, b].map((result, at) =>
      h(
        "div",
        { class: "side" },
        h("span", { class: "small muted", title: names[at] }, at ? "B" : "A"),
        h("span", {}, h("span", { class: result.abstained ? "none" : "tag" }, soft(answerOf(result))), ` ${score(result.score)}`),
        h("span", { class: "small muted" }, result.scores.slice(1, LABELS_KEPT).map((item) => `${item.label} ${score(item.score)}`).join(", "), result.truncated ? " · cut off" : null),
      ),
    ),
  );
}

function asFile(rows, names) {
  const output = new Output("text/csv");
  output.write(csvLine(["line", "text", ...names.flatMap((name) => [`${name}.answer`, `${name}.score`]), "agree"]));
  for (const { line, text, a, b, agree } of rows) output.write(csvLine([line, text, answerOf(a), a.score, answerOf(b), b.score, agree]));
  return output.blob();
}
