// A text with its explanation drawn over it: which words weighed how much, which the model does not
// know, and what it has not read.

import { count, h, score } from "../dom.js";

const UNREAD_SHOWN = 400;
const LONG = 300;
// A score that changes by less than this is drawn pale, however little the other words change it.
const SMALL_CHANGE = 0.1;
const NO_CHANGE = 0.02;

/** Whether a result has an explanation that can be drawn. */
export const isDrawable = (explanation) => Array.isArray(explanation?.words);

/**
 * A text of a request with its words marked.
 *
 * field: "text" or "text_pair". explanation: of a result, or null. Offsets count code points, as in
 * Python, and not the UTF-16 units of JavaScript's strings.
 */
export function explained(text, field, explanation) {
  const points = Array.from(text);
  const read = explanation?.read?.[field] ?? points.length;
  const words = isDrawable(explanation) ? explanation.words.filter((word) => word.field === field) : [];
  const most = Math.max(explanation?.kind === "occlusion" ? SMALL_CHANGE : 1e-9, heaviest(explanation));
  const parts = [];
  let at = 0;
  for (const word of words.toSorted((a, b) => a.start - b.start)) {
    if (word.start < at) continue;
    parts.push(points.slice(at, word.start).join(""), mark(points.slice(word.start, word.end).join(""), word, most));
    at = word.end;
  }
  parts.push(points.slice(at, Math.max(at, read)).join(""));
  const unread = points.slice(Math.max(at, read));
  if (unread.length) {
    const left = unread.length - UNREAD_SHOWN;
    parts.push(
      h(
        "span",
        { class: "unread", title: "The model has not read this" },
        unread.slice(0, UNREAD_SHOWN).join(""),
        left > 0 ? ` … and ${count(left)} more characters` : null,
      ),
    );
  }
  // A long one scrolls, so the keyboard must reach it.
  const reached = points.length > LONG ? { tabindex: "0", role: "group", "aria-label": "The text" } : {};
  return h("p", { class: "explained", dir: "auto", ...reached }, points.length ? parts : h("span", { class: "muted" }, "(an empty text)"));
}

function heaviest(explanation) {
  return (explanation?.words ?? []).reduce((most, { weight }) => Math.max(most, Math.abs(weight)), 0);
}

/** What is said beside the drawing: the service's own note, and that no word alone matters. */
export function remarks(explanation) {
  const isFlat = explanation.kind === "occlusion" && explanation.words.length > 0 && heaviest(explanation) < NO_CHANGE;
  return [isFlat ? `No word alone changes the score by ${NO_CHANGE} or more.` : null, explanation.note ?? null].filter(Boolean).join(" ");
}

function mark(text, word, most) {
  const share = Math.abs(word.weight) / most;
  const title = `${text}: ${score(word.weight)}${word.unknown ? ", unknown to the model" : ""}`;
  const kinds = [word.weight < 0 ? "against" : "for", word.unknown ? "unknown" : null];
  return h("mark", { class: kinds.filter(Boolean).join(" "), title, style: { "--share": share.toFixed(3) } }, text);
}

/** The words that weighed most, as a list that can be read aloud. */
export function topWords(explanation, most = 5) {
  const words = explanation.words
    .filter(({ weight }) => weight !== 0)
    .toSorted((a, b) => Math.abs(b.weight) - Math.abs(a.weight))
    .slice(0, most);
  return words.map(({ word, weight, unknown }) => ({ word, weight: score(weight), unknown }));
}

/** What the marks of results mean, once for all of them; null if there are none. */
export function legend(results) {
  const drawn = results.map(({ explanation }) => explanation).filter((explanation) => isDrawable(explanation) && explanation.words.length);
  if (!drawn.length) return null;
  const isUnknown = drawn.some(({ words }) => words.some(({ unknown }) => unknown));
  const sentence =
    drawn[0].kind === "occlusion"
      ? "Marked: how much the score of the label falls when the word is hidden. Blue speaks for the label, orange against it."
      : "Marked: what the prompt was made of. That is where the adapter looked, not why it answered so.";
  return h("p", { class: "small muted legend" }, sentence, isUnknown ? " Dotted: a word that the model does not know." : null);
}
