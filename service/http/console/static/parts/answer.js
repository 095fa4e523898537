// One result as a card: the answer, its scores as bars, its threshold, and the text as the model saw it.

import { brief, count, counted, h, put, score, soft } from "../dom.js";
import { bars } from "./bars.js";
import { explained, isDrawable, remarks, topWords } from "./explained.js";

const FIRST_BARS = 5;

/** The answer of a result in words: a label, labels, or that there is none. */
export function answerOf(result) {
  if (result.labels) return result.labels.length ? result.labels.join(", ") : "no label";
  return result.abstained ? "abstains" : result.label;
}

/**
 * The card of a result.
 *
 * input: `{text, text_pair}`. spec: of the revision that answered, or null. abstainBelow: the request's
 * own, or null. reference: what was asked for.
 */
export function answerCard({ result, input, spec, abstainBelow, reference }) {
  const threshold = abstainBelow ?? spec?.decision?.abstain_below ?? null;
  const explanation = isDrawable(result.explanation) ? result.explanation : null;
  return h(
    "article",
    { class: "card answer", "aria-label": `${result.adapter}: ${answerOf(result)}` },
    h("header", {}, h("h2", {}, result.adapter), h("span", { class: "small muted", title: `revision ${result.revision}` }, `revision ${brief(result.revision)}`)),
    verdict(result, threshold),
    notices(result, input, explanation),
    scores(result, spec, threshold),
    explanation && drawing(explanation, input),
    h("p", { class: "small muted" }, `${counted(result.tokens, "token")} read`, reference.includes("@") ? " · pinned" : null),
  );
}

function verdict(result, threshold) {
  if (result.labels) {
    return h("p", { class: "verdict" }, result.labels.length ? result.labels.map((label) => h("span", { class: "tag" }, soft(label))) : h("span", { class: "none" }, "no label reaches its threshold"));
  }
  if (result.abstained) {
    return h(
      "p",
      { class: "verdict" },
      h("span", { class: "none" }, "abstains"),
      h("span", { class: "small muted" }, ` The best label, ${result.label}, has ${score(result.score)}, and ${score(threshold ?? 0)} is needed.`),
    );
  }
  return h("p", { class: "verdict" }, h("span", { class: "tag" }, soft(result.label)), h("span", { class: "muted" }, ` ${score(result.score)}`));
}

function notices(result, input, explanation) {
  if (!result.truncated) return null;
  const fields = Object.entries(input).filter(([, text]) => typeof text === "string");
  const parts = explanation
    ? fields.map(([field, text]) => {
        const length = Array.from(text).length;
        const read = explanation.read?.[field] ?? length;
        return read < length ? `${count(read)} of the ${count(length)} characters${field === "text_pair" ? " of the second text" : ""}` : null;
      })
    : [];
  const read = parts.filter(Boolean).join(" and ");
  return h("p", { class: "box warn" }, h("strong", {}, "Cut off. "), read ? `The model has read ${read}.` : "The text is longer than this adapter reads.");
}

function scores(result, spec, threshold) {
  const thresholds = new Map(spec?.activation === "sigmoid" ? spec.labels.map((label, at) => [label, spec.thresholds?.[at] ?? 0.5]) : []);
  const given = new Set(result.labels ?? (result.abstained ? [] : [result.label]));
  const table = (most) =>
    bars(
      `Scores of ${result.adapter}`,
      result.scores.slice(0, most).map((item, at) => {
        // Of a single answer the threshold is that of the best label.
        const needed = thresholds.get(item.label) ?? (at === 0 ? threshold : null);
        return { label: item.label, share: item.score, figure: score(item.score), needed: needed ? { at: needed, figure: score(needed) } : null, isGiven: given.has(item.label) };
      }),
    );
  if (result.scores.length <= FIRST_BARS) return table(FIRST_BARS);
  const place = h("div", {}, table(FIRST_BARS));
  const all = `All ${count(result.scores.length)} labels`;
  const button = h("button", { type: "button", class: "quiet flush", "aria-expanded": "false" }, all);
  button.addEventListener("click", () => {
    const isOpen = button.getAttribute("aria-expanded") === "true";
    button.setAttribute("aria-expanded", String(!isOpen));
    button.textContent = isOpen ? all : "Fewer labels";
    put(place, table(isOpen ? FIRST_BARS : Infinity));
  });
  return [place, button];
}

function drawing(explanation, input) {
  const fields = Object.entries(input).filter(([, text]) => typeof text === "string");
  const top = topWords(explanation);
  const special = explanation.special_tokens;
  return h(
    "div",
    { class: "drawing" },
    fields.map(([field, text]) => explained(text, field, explanation)),
    remarks(explanation) ? h("p", { class: "small muted" }, remarks(explanation)) : null,
    top.length
      ? h(
          "details",
          { class: "small" },
          h("summary", {}, "The heaviest words"),
          h("ol", {}, top.map(({ word, weight, unknown }) => h("li", {}, `${word} `, h("span", { class: "muted" }, weight, unknown ? ", unknown" : null)))),
          explanation.kind !== "occlusion" && special.weight !== null ? h("p", { class: "muted" }, `${score(special.weight)} of the weight is of special tokens, which are no words.`) : null,
        )
      : null,
  );
}
