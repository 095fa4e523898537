// Try: a text through one adapter or many, and a file of texts.

import * as api from "../api.js";
import { brief, duration, h, put, unique } from "../dom.js";
import { announce, errorBox } from "../shell.js";
import { answerCard, answerOf } from "../parts/answer.js";
import { legend } from "../parts/explained.js";
import { forget, specOf } from "../parts/catalog.js";
import { labelling } from "../parts/labelling.js";
import { adapterPicker } from "../parts/picker.js";
import { snippets } from "../parts/snippets.js";
import { textField } from "../parts/textfield.js";

const MOST_ADAPTERS = 20;
const FEW = 4;
const EXAMPLE = "Free ringtone! Reply YES to claim it today";

// What was typed, for when one comes back from another page. Not in the address: texts are private.
const kept = { text: "", pair: "", isPair: false, explain: "attention", abstain: "" };

export async function mount(root, params, context) {
  let asking = null;
  const seen = new Map();

  const picker = adapterPicker({
    label: "Adapters", most: MOST_ADAPTERS, value: params.query.getAll("adapter").slice(0, MOST_ADAPTERS),
    onChange: (references) => {
      context.setQuery(references.map((reference) => ["adapter", reference]));
      refresh();
    },
  });
  const text = textField({ label: "Text", rows: 6, value: kept.text, placeholder: "Type or paste a text", offer: "Label its lines as a file", onTooLong: (file) => labels.use(file) });
  const pair = textField({ label: "Second text", rows: 3, value: kept.pair, placeholder: "For adapters that compare two texts" });
  const isPair = h("input", { type: "checkbox", checked: kept.isPair, on: { change: refresh } });
  const explain = choice("Explain", [["attention", "attention"], ["occlusion", "occlusion"], ["none", "nothing"]], kept.explain, refresh);
  const abstain = h("input", { id: unique("abstain"), type: "number", min: 0, max: 1, step: 0.05, value: kept.abstain, placeholder: "as the adapter says", on: { input: refresh } });
  const send = h("button", { class: "primary", type: "submit", "data-send": true }, "Classify");
  const example = h("button", { type: "button", class: "quiet", on: { click: () => { text.value = EXAMPLE; refresh(); text.input.focus(); } } }, "Use an example");
  const code = snippets();
  const results = h("div", { class: "results" });
  const labels = labelling({ adapters: () => picker.value, abstainBelow });

  for (const field of [text, pair]) field.input.addEventListener("input", refresh);

  put(
    root,
    h("h1", {}, "Try"),
    h(
      "div",
      { class: "columns" },
      h(
        "form",
        { class: "card", "aria-label": "A text to classify", on: { submit: (event) => { event.preventDefault(); classify(); } } },
        picker.element,
        text.element,
        h("label", { class: "check" }, isPair, "a pair of texts"),
        pair.element,
        explain.element,
        h("details", {}, h("summary", {}, "Options"), h("div", { class: "field" }, h("label", { for: abstain.id }, "Abstain below"), abstain, h("p", { class: "small muted" }, "A best score below it is no answer. Not for adapters that give several labels."))),
        h("div", { class: "row" }, send, example),
      ),
      results,
    ),
    code.element,
    labels.element,
  );
  put(results, empty());
  refresh();
  if (!picker.value.length) await chooseFirst();

  function abstainBelow() {
    return abstain.value === "" || !abstain.validity.valid ? null : Number(abstain.value);
  }

  /** The request as it is chosen now, or null while there is none. */
  function request() {
    const references = picker.value;
    if (!references.length) return null;
    const own = isPair.checked ? { text: text.value, text_pair: pair.value } : { text: text.value };
    const inputs = references.length > 1 ? references.map((adapter) => ({ ...own, adapter })) : isPair.checked ? own : text.value;
    return {
      ...(references.length > 1 ? {} : { adapter: references[0] }),
      inputs,
      ...(explain.value === "none" ? {} : { explain: explain.value }),
      ...(abstainBelow() === null ? {} : { abstain_below: abstainBelow() }),
    };
  }

  function refresh() {
    Object.assign(kept, { text: text.value, pair: pair.value, isPair: isPair.checked, explain: explain.value, abstain: abstain.value });
    pair.element.hidden = !isPair.checked;
    code.set(request());
  }

  /** All adapters if there are few: one text through all of them is what this service is for. */
  async function chooseFirst() {
    try {
      const { adapters } = await api.get("v1/adapters", { query: { limit: FEW + 1 }, ask: "missing", signal: context.signal });
      const ready = adapters.filter(({ state }) => state === "ready").map(({ name }) => name);
      if (ready.length && !picker.value.length) picker.value = adapters.length > FEW ? ready.slice(0, 1) : ready;
      if (!adapters.length) put(results, h("div", { class: "card" }, h("p", { class: "strong" }, "There is no adapter yet."), h("p", { class: "muted" }, "Train one with python -m train fit, or upload a file.")));
    } catch (error) {
      if (error.name !== "AbortError" && error.status !== 403) put(results, errorBox(error));
    }
  }

  async function classify() {
    const body = request();
    if (body === null) {
      put(results, errorBox({ message: "Choose an adapter first." }));
      return;
    }
    asking?.abort();
    const controller = (asking = new AbortController());
    const began = performance.now();
    const input = isPair.checked ? { text: text.value, text_pair: pair.value } : { text: text.value };
    const references = picker.value;
    results.setAttribute("aria-busy", "true");
    try {
      const answer = await api.post("v1/predict", body, { signal: controller.signal });
      const seconds = (performance.now() - began) / 1000;
      const specs = await Promise.all(answer.results.map(({ adapter, revision }) => specOf(adapter, revision)));
      if (controller !== asking) return;
      const replaced = replacements(answer.results, references);
      const cards = answer.results.map((result, at) => answerCard({ result, input, spec: specs[at], abstainBelow: body.abstain_below ?? null, reference: references[at] }));
      put(results, replaced.length ? h("p", { class: "box warn" }, `Another revision answers than before: ${replaced.join("; ")}.`) : null, legend(answer.results), cards, timing(answer.timings_ms, seconds));
      announce(answer.results.map((result) => `${result.adapter}: ${answerOf(result)}`).join("; "));
    } catch (error) {
      if (controller !== asking || error.name === "AbortError") return;
      if (error.status === 404) references.forEach((reference) => forget(reference));
      put(results, errorBox(error));
    } finally {
      if (controller === asking) results.removeAttribute("aria-busy");
    }
  }

  /** What answers by another revision than the last time: "sms-spam was 5f2c8a0e, is 0c9d1e2f". */
  function replacements(answers, references) {
    const changed = [];
    answers.forEach(({ revision }, at) => {
      const before = seen.get(references[at]);
      if (before && before !== revision) changed.push(`${references[at]} was ${brief(before)}, is ${brief(revision)}`);
      seen.set(references[at], revision);
    });
    return changed;
  }

  return () => {
    asking?.abort();
    labels.stop();
  };
}

function empty() {
  return h("div", { class: "card hint" }, h("p", { class: "muted" }, "The answer appears here: labels with their scores, and the words that the model looked at. All chosen adapters read the text in one batch."));
}

function timing(timings, seconds) {
  const parts = Object.entries(timings).map(([name, value]) => `${name} ${duration(value / 1000)}`);
  return h("p", { class: "small muted" }, `Answered in ${duration(seconds)}: ${parts.join(", ")}.`);
}

function choice(legend, options, value, onChange) {
  const name = unique("choice");
  const inputs = options.map(([id]) => h("input", { type: "radio", name, value: id, checked: id === value, on: { change: onChange } }));
  return {
    element: h("fieldset", { class: "segments" }, h("legend", {}, legend), options.map(([, title], at) => h("label", {}, inputs[at], h("span", {}, title)))),
    get value() {
      return inputs.find(({ checked }) => checked).value;
    },
  };
}
