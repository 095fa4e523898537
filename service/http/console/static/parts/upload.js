// An adapter file from the disk to the service: dropped or chosen, checked by the service without being
// stored, compared with what is served, tried on a few texts, and only then uploaded.

import * as api from "../api.js";
import { brief, bytes, count, counted, h, put, score, unique } from "../dom.js";
import { announce, confirm, errorBox, toast } from "../shell.js";
import { answerOf } from "./answer.js";
import { changes, labelLine } from "./changes.js";
import { dropArea } from "./droparea.js";
import { markdown } from "./markdown.js";

const NAME = /^[a-z0-9][a-z0-9._-]{0,63}$/;
const MOST_TEXTS = 50;
const MOST_CARD_BYTES = 2 ** 18;

/**
 * A place for a file, and what comes of it.
 *
 * name: of the adapter, if it is given. onChanged(name): called when something was stored.
 * Returns `{element, close}`.
 */
export function uploader({ name: given = null, context, onChanged }) {
  const work = h("div", { class: "upload-work" });
  const area = dropArea({
    label: given ? `Drop a new file for ${given} here, or choose one` : "Drop an adapter file here, or choose one",
    hint: "X.safetensors, and X.md with it if there is a model card. It is checked first; nothing changes until you say so.",
    accept: ".safetensors,.md",
    multiple: true,
    onFiles: take,
  });
  let leaving = new AbortController();
  context.signal.addEventListener("abort", () => leaving.abort());

  return { element: h("section", { "aria-label": "Upload" }, area, work), close: () => leaving.abort() };

  function take(files) {
    leaving.abort();
    leaving = new AbortController();
    const card = files.find(({ name }) => /\.(md|markdown)$/i.test(name)) ?? null;
    const others = files.filter((file) => file !== card);
    if (others.length > 1) {
      refuse(`One adapter file at a time: these are ${others.length}.`);
    } else if (others.length === 1) {
      begin(others[0], card);
    } else if (given === null) {
      refuse("This is a model card. Drop its adapter file with it, or drop it on the page of its adapter.");
    } else {
      keepCard(card);
    }
  }

  function refuse(message) {
    put(work, errorBox({ message }));
  }

  /** Ask for the name, unless it is clear, and check. */
  function begin(file, card) {
    const run = { file, card, name: given ?? suggested(file.name), signal: leaving.signal, isStaged: false, report: null };
    const id = unique("name");
    const field = h("input", { id, type: "text", value: run.name, autocomplete: "off", spellcheck: "false", autocapitalize: "none", maxlength: 64 });
    const outcome = h("div");
    const form = h(
      "form",
      {
        class: "row end-aligned", hidden: given !== null,
        on: { submit: (event) => { event.preventDefault(); run.name = field.value.trim(); check(run, outcome); } },
      },
      h("div", { class: "grow" }, h("label", { for: id, class: "name" }, "Serve it under the name"), field),
      h("button", { type: "submit" }, "Check under this name"),
    );
    put(work, h("section", { class: "card report", "aria-label": "The file" }, h("h2", {}, file.name, h("span", { class: "muted" }, ` · ${bytes(file.size)}`)), form, outcome));
    check(run, outcome);
  }

  async function check(run, outcome) {
    if (!NAME.test(run.name)) {
      put(outcome, errorBox({ message: "A name has 1 to 64 of a-z 0-9 . _ - and begins with a letter or digit." }));
      return;
    }
    put(outcome, h("p", { role: "status" }, `Checking ${bytes(run.file.size)} as ${run.name}…`), h("progress", { "aria-label": "Checking" }));
    try {
      run.report = await api.put(path(run.name), run.file, { query: { dry_run: "true" }, headers: OCTETS, signal: run.signal });
      showReport(run, outcome);
    } catch (error) {
      if (isAbort(error)) return;
      put(outcome, errorBox(error, again(run, outcome), cancelButton()));
    }
  }

  function showReport(run, outcome) {
    const { report } = run;
    const { adapter, serving, error, difference } = report;
    const isSame = serving === adapter.revision;
    const isForced = error?.type === "replacement_not_forced";
    const isUsable = (report.accepted || isForced) && !isSame;
    const meant = h("input", { type: "checkbox", on: { change: () => (go.disabled = !meant.checked) } });
    const go = h("button", { class: "primary", disabled: isForced, "data-send": true, on: { click: () => upload(run, outcome) } }, serving === null ? `Publish ${run.name}` : `Replace ${brief(serving)}`);
    const trouble = h("div");
    run.trouble = trouble;
    put(
      outcome,
      verdict(report, run, { isSame, isForced }),
      isForced ? h("label", { class: "check" }, meant, "Clients will be told something else: I mean that.") : null,
      adapter.spec === null ? null : facts(adapter),
      difference && !isSame ? [h("h3", {}, `What changes against ${brief(serving)}, which is served now`), changes(difference)] : null,
      isUsable && serving !== null ? trial(run) : null,
      run.card ? cardPreview(run.card) : null,
      trouble,
      h("div", { class: "row end" }, (run.cancel = cancelButton(run)), isUsable ? go : null, isSame && run.card ? h("button", { class: "primary", on: { click: () => onlyCard(run, outcome) } }, "Keep the model card with it") : null),
    );
    announce(report.accepted ? "The file is a valid adapter." : `Refused: ${error.message}`, { urgent: !report.accepted });
  }

  /** Both revisions on texts of the person's own: a file has no examples in it. */
  function trial(run) {
    const { serving, adapter } = run.report;
    const id = unique("texts");
    const texts = h("textarea", { id, rows: 4, placeholder: "One text on each line" });
    const answers = h("div");
    const button = h("button", { type: "button", on: { click: compare } }, run.isStaged ? "Compare" : "Stage the file and compare");
    return h(
      "details",
      { class: "trial", open: run.isStaged },
      h("summary", {}, "Compare its answers first"),
      h("p", {}, `An adapter file has no examples in it. Paste a few texts: the file is staged, that is stored beside ${brief(serving)} without answering anything, and both answer your texts.`),
      h("div", { class: "field" }, h("label", { for: id, class: "name" }, `Texts, at most ${MOST_TEXTS}`), texts),
      h("div", { class: "row" }, button),
      answers,
    );

    async function compare() {
      const lines = texts.value.split("\n").map((line) => line.trim()).filter(Boolean).slice(0, MOST_TEXTS);
      if (!lines.length) {
        put(answers, errorBox({ message: "There is no text yet: paste one on each line." }));
        return;
      }
      button.disabled = true;
      put(answers, h("p", { role: "status" }, run.isStaged ? "Asking both…" : "Staging…"));
      try {
        await stage(run);
        button.textContent = "Compare";
        const inputs = lines.flatMap((text) => [serving, adapter.revision].map((revision) => ({ text, adapter: `${run.name}@${revision}` })));
        const { results } = await api.post("v1/predict", { inputs }, { signal: run.signal });
        put(answers, sideBySide(lines, results, serving));
      } catch (error) {
        if (!isAbort(error)) put(answers, errorBox(error));
      } finally {
        button.disabled = false;
      }
    }
  }

  async function stage(run) {
    if (run.isStaged) return;
    const { serving } = run.report;
    await api.put(path(run.name), run.file, { query: { stage: "true" }, headers: { ...OCTETS, "If-Match": `"${serving}"` }, signal: run.signal });
    run.isStaged = true;
    run.cancel.textContent = "Close";
    toast(`Staged: ${run.name} goes on serving ${brief(serving)}.`, "good");
    onChanged(run.name);
  }

  async function upload(run, outcome) {
    const { serving, adapter } = run.report;
    const what = serving === null ? `${run.name} is new and answers from now on.` : `${run.name} answers by ${brief(adapter.revision)} from now on, and no longer by ${brief(serving)}. You can roll back.`;
    if (!(await confirm({ title: serving === null ? `Publish ${run.name}?` : `Replace the revision of ${run.name}?`, body: what, action: serving === null ? "Publish" : "Replace" }))) return;
    put(run.trouble, h("p", { role: "status" }, "Uploading…"), h("progress", { "aria-label": "Uploading" }));
    // Whatever happened since the check, only the revision that was shown is replaced.
    const condition = serving === null ? { "If-None-Match": "*" } : { "If-Match": `"${serving}"` };
    let stored;
    try {
      stored = run.isStaged
        ? await api.post(`${path(run.name)}/rollback`, { revision: adapter.revision }, { headers: condition })
        : await api.put(path(run.name), run.file, { headers: { ...OCTETS, ...condition } });
    } catch (error) {
      if (error.status === 412) put(run.trouble, conflict(error, run, outcome));
      else put(run.trouble, errorBox(error));
      return;
    }
    put(work);
    toast(`${run.name} serves ${brief(stored.revision)} now.`, "good");
    if (run.card) await storeCard(run.name, adapter.revision, run.card);
    onChanged(run.name);
    if (given === null) context.go(`#/adapters/${run.name}`);
  }

  function conflict(error, run, outcome) {
    return h(
      "div",
      {},
      errorBox({ ...plain(error), message: `${run.name} was changed since this file was checked. Nothing was uploaded. ${error.message}` }, h("button", { on: { click: () => { onChanged(run.name); check(run, outcome); } } }, "Check against what is served now")),
    );
  }

  function again(run, outcome) {
    return h("button", { on: { click: () => check(run, outcome) } }, "Check again");
  }

  function cancelButton(run = null) {
    return h("button", { on: { click: () => cancel(run) } }, run?.isStaged ? "Close" : "Cancel");
  }

  async function cancel(run) {
    if (run?.isStaged) {
      const { revision } = run.report.adapter;
      const isGoing = await confirm({ title: "Keep the staged file?", body: `${brief(revision)} is stored beside the served revision of ${run.name} and answers nothing. Remove it, or cancel and find it in the list of revisions.`, action: "Remove it", danger: true });
      if (isGoing) {
        try {
          // Another revision may be tried by now.
          const traffic = await api.get(`${path(run.name)}/traffic`).catch((error) => { if (error.status !== 404) throw error; });
          if (traffic?.state === "active" && traffic.revision === revision) await api.delete(`${path(run.name)}/traffic`);
          await api.delete(`${path(run.name)}/revisions/${revision}`);
          toast("The staged file was removed.", "good");
        } catch (error) {
          put(run.trouble, errorBox(error));
          return;
        }
        onChanged(run.name);
      }
    }
    leaving.abort();
    put(work);
  }

  /** A card alone, for the revision that is served. */
  function keepCard(card) {
    const trouble = h("div");
    const go = h("button", {
      class: "primary",
      on: {
        click: async () => {
          if (await storeCard(given, null, card, trouble)) {
            put(work);
            onChanged(given);
          }
        },
      },
    }, "Keep it with the served revision");
    put(work, h("section", { class: "card", "aria-label": "The model card" }, cardPreview(card, { open: true }), trouble, h("div", { class: "row end" }, cancelButton(), go)));
  }

  async function onlyCard(run) {
    if (await storeCard(run.name, run.report.adapter.revision, run.card, run.trouble)) {
      put(work);
      onChanged(run.name);
    }
  }
}

const OCTETS = { "Content-Type": "application/octet-stream" };
const path = (name) => `v1/adapters/${encodeURIComponent(name)}`;
const isAbort = (error) => error.name === "AbortError";
const plain = ({ message, details, status, type, requestId }) => ({ message, details, status, type, requestId });

/** Store a model card; what goes wrong is shown in `trouble`, or in passing. */
async function storeCard(name, revision, card, trouble = null) {
  try {
    if (card.size > MOST_CARD_BYTES) throw new Error(`${card.name} has ${bytes(card.size)}; a model card may have ${bytes(MOST_CARD_BYTES)}.`);
    await api.put(`${path(name)}/card`, await card.text(), { query: { revision }, headers: { "Content-Type": "text/markdown" } });
    toast("The model card is kept.", "good");
    return true;
  } catch (error) {
    if (trouble) put(trouble, errorBox(error));
    else toast(`The model card was not kept: ${error.message}`, "bad");
    return false;
  }
}

function verdict(report, run, { isSame, isForced }) {
  const { error, serving } = report;
  if (isForced) {
    return h("div", { class: "box warn" }, h("p", {}, h("strong", {}, `A valid adapter that answers something else than ${run.name} does now.`)), h("ul", {}, error.details.map((detail) => h("li", {}, detail))));
  }
  if (error !== null) return errorBox(error);
  if (isSame) return h("div", { class: "box" }, h("p", {}, `${run.name} serves exactly these bytes already. Uploading them changes nothing.`));
  return h(
    "div",
    { class: "box good" },
    h("p", {}, h("strong", {}, "A valid adapter for this service. "), serving === null ? `No adapter is named ${run.name} yet.` : "It was run on a text; nothing was stored."),
    report.unchecked?.length ? h("p", { class: "small" }, `Not checked: ${report.unchecked.join("; ")}.`) : null,
  );
}

function facts(adapter) {
  const { spec } = adapter;
  const rows = [
    ["kind", adapter.method],
    ["backbone", adapter.backbone],
    ["several labels a text", spec.activation === "sigmoid" ? "yes" : "no"],
    ["trained on", spec.provenance.data],
    ["trained", adapter.created],
    ["revision", h("code", {}, brief(adapter.revision))],
  ];
  return [
    h("dl", { class: "facts" }, rows.filter(([, value]) => value).map(([name, value]) => [h("dt", {}, name), h("dd", {}, value)])),
    labelLine(counted(adapter.labels.length, "label"), adapter.labels),
  ];
}

function cardPreview(card, { open = false } = {}) {
  const content = h("div", {}, h("p", { role: "status" }, "Reading…"));
  const reading = card.size > MOST_CARD_BYTES ? Promise.reject(new Error(`${card.name} has ${bytes(card.size)}; a model card may have ${bytes(MOST_CARD_BYTES)}.`)) : card.text();
  reading.then((text) => put(content, markdown(text)), (error) => put(content, errorBox(error)));
  return h("details", { open }, h("summary", {}, `Its model card, ${card.name}`), content);
}

function sideBySide(texts, results, serving) {
  const pairs = texts.map((text, at) => ({ text, before: results[2 * at], after: results[2 * at + 1] }));
  const differing = pairs.filter(({ before, after }) => answerOf(before) !== answerOf(after)).length;
  return [
    h("p", { class: "strong", role: "status" }, differing ? `${count(differing)} of ${counted(pairs.length, "text")} would get another answer.` : `All ${counted(pairs.length, "text")} would get the same answer.`),
    h(
      "div",
      { class: "scroll", tabindex: "0", role: "region", "aria-label": "Answers of both" },
      h(
        "table",
        { class: "plain" },
        h("thead", {}, h("tr", {}, ["text", `served now (${brief(serving)})`, "this file"].map((name) => h("th", { scope: "col" }, name)))),
        h(
          "tbody",
          {},
          pairs.map(({ text, before, after }) => {
            const isOther = answerOf(before) !== answerOf(after);
            return h("tr", { class: isOther ? "apart" : null }, h("th", { scope: "row" }, text), h("td", {}, said(before)), h("td", {}, said(after), isOther ? h("span", { class: "none" }, "other") : null));
          }),
        ),
      ),
    ),
  ];
}

const said = (result) => [answerOf(result), h("span", { class: "muted" }, ` ${score(result.score)} `)];

/** A name that the service takes, from a file's name. */
export function suggested(file) {
  const name = file.replace(/\.[^.]*$/, "").toLowerCase().replace(/[^a-z0-9._-]+/g, "-").replace(/^[^a-z0-9]+/, "").slice(0, 64);
  return name || "adapter";
}
