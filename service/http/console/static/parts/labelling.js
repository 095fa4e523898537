// A file of texts in, the same file with labels out.

import { count, counted, duration, h, put } from "../dom.js";
import { announce, errorBox } from "../shell.js";
import { bars } from "./bars.js";
import { detail, nameOf } from "./catalog.js";
import { dropArea } from "./droparea.js";
import { ACCEPTED, Output, csvLine, download, fieldOf, jsonLine, look, read } from "./files.js";
import { job } from "./job.js";
import { preview } from "./preview.js";
import { progress } from "./progress.js";

const FAULTS_SHOWN = 5;
const MOST_COUNTS = 12;

/**
 * The card that labels files.
 *
 * adapters: called for the references to use. abstainBelow: called for the request's own, or null.
 * Returns `{element, use(file), stop()}`.
 */
export function labelling({ adapters, abstainBelow }) {
  let running = null;
  const stage = h("div");
  const area = dropArea({
    label: "Drop a file of texts, or choose one",
    hint: "A text on each line (.txt), .csv, .tsv or .jsonl, also .gz. It is read here, piece by piece, and sent to this service alone.",
    accept: ACCEPTED,
    onFiles: ([file]) => use(file),
  });
  const element = h("section", { class: "card", "aria-labelledby": "label-a-file" }, h("h2", { id: "label-a-file" }, "Label a file"), area, stage);

  async function use(file) {
    stop();
    try {
      choose(file, await look(file));
    } catch (error) {
      put(stage, errorBox(error));
    }
    stage.scrollIntoView({ block: "nearest" });
  }

  function choose(file, found) {
    const shown = preview(file, found);
    const trouble = h("div");
    const start = h("button", { class: "primary", type: "button" }, "Label this file");
    start.addEventListener("click", () => {
      const references = adapters();
      if (references.length) run(file, found, { text: shown.text, pair: shown.pair, references });
      else put(trouble, errorBox({ message: "Choose an adapter first." }));
    });
    put(stage, shown.element, trouble, h("div", { class: "row" }, start));
  }

  async function run(file, found, plan) {
    stop();
    const controller = (running = new AbortController());
    const { signal } = controller;
    const tally = { done: 0, read: 0, faults: [], failed: 0, cut: 0, counts: new Map(plan.references.map((name) => [name, new Map()])), revisions: new Map() };
    const shown = progress({ label: `Labelling ${file.name}`, total: file.size, onCancel: () => controller.abort() });
    put(stage, h("p", {}, h("strong", {}, file.name)), shown.element);
    announce(`Labelling ${file.name}`);
    const writer = await writerFor(found, plan);
    let ended = null;
    try {
      const records = read(file, { signal, onBytes: (taken) => (tally.read = taken) });
      const own = abstainBelow();
      const linesOf = (record) => requestLines(record, plan, own);
      for await (const { item, answers } of job(records, linesOf, { signal, onWait: shown.wait })) {
        writer.write(item, note(item, answers, plan, tally));
        shown.step(tally.done, tally.read);
      }
    } catch (error) {
      ended = error;
    }
    // Another file was chosen meanwhile, or the page was left.
    if (running !== controller) return;
    running = null;
    finish({ file, writer, tally, ended, seconds: shown.seconds, again: () => choose(file, found) });
  }

  function finish({ file, writer, tally, ended, seconds, again }) {
    const wasCancelled = ended?.name === "AbortError";
    const complete = ended === null;
    const name = `${file.name.replace(/\.gz$/, "").replace(/\.[^.]*$/, "")}-labelled${complete ? "" : "-part"}.${writer.ending}`;
    const text = complete ? `${counted(tally.done, "text")} labelled in ${duration(seconds)}.` : `${wasCancelled ? "Cancelled" : "Stopped"} after ${counted(tally.done, "text")}.`;
    announce(text, { urgent: !complete });
    const replaced = [...tally.revisions].filter(([, revisions]) => revisions.size > 1).map(([adapter]) => adapter);
    put(
      stage,
      ended && !wasCancelled ? errorBox(ended) : null,
      h("p", { class: "strong" }, text),
      tally.failed ? h("div", { class: "box warn" }, h("p", {}, `${counted(tally.failed, "text")} could not be answered; the file says why in each row.`), h("ul", {}, tally.faults.map((fault) => h("li", {}, fault)))) : null,
      replaced.length ? h("p", { class: "box warn" }, `${replaced.join(", ")}: the revision was replaced meanwhile. Each row names the one that answered.`) : null,
      tally.cut ? h("p", { class: "box warn" }, `${counted(tally.cut, "text")} longer than the adapter reads: cut off.`) : null,
      [...tally.counts].map(([adapter, counts]) => countTable(adapter, counts)),
      h(
        "div",
        { class: "row" },
        tally.done ? h("button", { class: "primary", type: "button", on: { click: () => download(writer.blob(), name) } }, `Download ${name}`) : null,
        h("button", { type: "button", on: { click: again } }, complete ? "Label it again" : "Begin again"),
      ),
    );
  }

  function stop() {
    running?.abort();
    running = null;
  }

  return { element, use, stop };
}

function requestLines(record, { text, pair, references }, abstainBelow) {
  const value = fieldOf(record, text);
  if (record.fault === undefined && value === undefined) record.fault = `no text in “${text}”`;
  if (record.fault !== undefined) return [];
  const second = pair ? fieldOf(record, pair) : undefined;
  const options = abstainBelow === null ? {} : { abstain_below: abstainBelow };
  return references.map((adapter) => ({ text: value, ...(second === undefined ? {} : { text_pair: second }), adapter, top_k: 1, ...options }));
}

/** Count a record's answers, and give one for each adapter also where nothing was asked. */
function note(record, answers, { references }, tally) {
  const all = record.fault === undefined ? answers : references.map(() => ({ error: { type: "unreadable", message: record.fault } }));
  tally.done += 1;
  if (all.some(({ error }) => error)) {
    tally.failed += 1;
    const message = `line ${record.line}: ${all.find(({ error }) => error).error.message}`;
    if (tally.faults.length < FAULTS_SHOWN) tally.faults.push(message);
  }
  if (all.some(({ truncated }) => truncated)) tally.cut += 1;
  all.forEach((answer, at) => {
    if (answer.error) return;
    const counts = tally.counts.get(references[at]);
    const given = answer.labels ? (answer.labels.length ? answer.labels : ["no label"]) : [answer.abstained ? "abstains" : answer.label];
    for (const label of given) counts.set(label, (counts.get(label) ?? 0) + 1);
    const revisions = tally.revisions.get(answer.adapter) ?? new Set();
    tally.revisions.set(answer.adapter, revisions.add(answer.revision));
  });
  return all;
}

function countTable(adapter, counts) {
  const sorted = [...counts].sort((a, b) => b[1] - a[1]);
  const most = sorted[0]?.[1] ?? 1;
  const rows = sorted.slice(0, MOST_COUNTS).map(([label, texts]) => ({ label, share: texts / most, figure: count(texts), isGiven: true }));
  const rest = sorted.slice(MOST_COUNTS);
  if (rest.length) rows.push({ label: counted(rest.length, "other label"), figure: count(rest.reduce((sum, [, texts]) => sum + texts, 0)) });
  return bars(adapter, rows, { isCaptionShown: true, unit: "texts" });
}

/** What writes the labelled file: CSV with columns in addition, or the same objects with `predictions`. */
async function writerFor({ kind, columns }, { references }) {
  const output = new Output(kind === "jsonl" ? "application/x-ndjson" : "text/csv");
  const shared = { blob: () => output.blob(), ending: kind === "jsonl" ? "jsonl" : "csv" };
  if (kind === "jsonl") {
    return {
      ...shared,
      write(record, answers) {
        const predictions = Object.fromEntries(answers.map((answer, at) => [references[at], answer.error ? { error: answer.error } : answer]));
        output.write(jsonLine(record, "predictions", predictions));
      },
    };
  }
  const sets = await Promise.all(references.map(async (reference) => (await detail(nameOf(reference)).catch(() => null))?.spec?.activation === "sigmoid"));
  const names = (reference, at) => ["label", "score", ...(sets[at] ? ["labels"] : []), "abstained", "truncated", "revision", "error"].map((name) => `${reference}.${name}`);
  const own = kind === "txt" ? ["text"] : columns;
  output.write(csvLine([...own, ...references.flatMap(names)]));
  return {
    ...shared,
    write(record, answers) {
      const values = answers.flatMap((answer, at) => [
        answer.label, answer.score, ...(sets[at] ? [answer.labels && JSON.stringify(answer.labels)] : []),
        answer.abstained, answer.truncated, answer.revision, answer.error?.message,
      ]);
      output.write(csvLine([...[record.value].flat(), ...values]));
    },
  };
}
