// Markdown as elements. A library takes it apart, and every piece becomes text or an element of this
// list: HTML in it is shown as it was written, images as their description, and links lead to the web
// or nowhere.

import { lexer } from "../vendor/marked.js";
import { h } from "../dom.js";

const MOST_CHARACTERS = 2 ** 18;
const DEEPEST = 24;
const FRONT_MATTER = /^---\r?\n([\s\S]*?)\r?\n---(?:\r?\n|$)/;
// In a page that has its own first and second level.
const HEADING_SHIFT = 2;

/** A Markdown text as an element. Its front matter, if it has one, is shown as it is. */
export function markdown(text) {
  const cut = text.slice(0, MOST_CHARACTERS);
  const front = FRONT_MATTER.exec(cut);
  const body = front ? cut.slice(front[0].length) : cut;
  let content;
  try {
    content = blocks(lexer(body, { gfm: true }), 0);
  } catch {
    content = code(body);
  }
  return h(
    "div",
    { class: "markdown" },
    front ? h("details", { class: "small" }, h("summary", {}, "Front matter"), code(front[1])) : null,
    content,
    cut.length < text.length ? h("p", { class: "muted" }, "The rest is too long to be shown.") : null,
  );
}

function blocks(tokens, depth) {
  if (depth > DEEPEST) return tokens.map(({ raw }) => raw);
  return tokens.map((token) => block(token, depth + 1));
}

function block(token, depth) {
  switch (token.type) {
    case "space":
    case "def":
      return null;
    case "heading":
      return h(`h${Math.min(6, token.depth + HEADING_SHIFT)}`, {}, inline(token.tokens, depth));
    case "paragraph":
      return h("p", {}, inline(token.tokens, depth));
    case "code":
      return code(token.text);
    case "blockquote":
      return h("blockquote", {}, blocks(token.tokens, depth));
    case "hr":
      return h("hr");
    case "list":
      return h(token.ordered ? "ol" : "ul", { start: token.ordered && token.start !== 1 ? token.start : null }, token.items.map((item) => h("li", {}, item.task ? (item.checked ? "☑ " : "☐ ") : null, blocks(item.tokens, depth))));
    case "table":
      return table(token, depth);
    case "text":
      return token.tokens ? inline(token.tokens, depth) : decoded(token.text);
    default:
      // HTML among them: as it was written.
      return h("p", {}, token.raw);
  }
}

function inline(tokens, depth) {
  if (depth > DEEPEST) return tokens.map(({ raw }) => raw);
  return tokens.map((token) => piece(token, depth + 1));
}

function piece(token, depth) {
  switch (token.type) {
    case "strong":
    case "em":
    case "del":
      return h(token.type, {}, inline(token.tokens, depth));
    case "codespan":
      return h("code", {}, token.text);
    case "br":
      return h("br");
    case "link": {
      const address = safe(token.href);
      const text = inline(token.tokens, depth);
      return address ? h("a", { href: address, rel: "noopener noreferrer nofollow", target: "_blank" }, text) : text;
    }
    case "image":
      return h("em", {}, `[image: ${token.text || token.href}]`);
    case "escape":
      return token.text;
    case "text":
      return token.tokens ? inline(token.tokens, depth) : decoded(token.text);
    default:
      return token.raw;
  }
}

// References that cards use; all others stay as they were written.
const REFERENCES = { "&amp;": "&", "&lt;": "<", "&gt;": ">", "&quot;": '"', "&#39;": "'", "&nbsp;": " " };

function decoded(text) {
  return text.replace(/&(?:amp|lt|gt|quot|#39|nbsp);/g, (reference) => REFERENCES[reference]);
}

function safe(address) {
  try {
    const url = new URL(address);
    return url.protocol === "https:" || url.protocol === "http:" ? url.href : null;
  } catch {
    return null;
  }
}

function table({ header, rows, align }, depth) {
  const cell = (tag, { tokens }, at, attributes = {}) => h(tag, { ...attributes, class: align[at] === "right" ? "figure" : null }, inline(tokens, depth));
  // A heading without a word is none.
  const heading = (item, at) => (item.text.trim() ? cell("th", item, at, { scope: "col" }) : cell("td", item, at));
  return h(
    "div",
    { class: "scroll", tabindex: "0", role: "group", "aria-label": "Table" },
    h("table", { class: "plain" }, h("thead", {}, h("tr", {}, header.map(heading))), h("tbody", {}, rows.map((row) => h("tr", {}, row.map((item, at) => cell("td", item, at)))))),
  );
}

function code(text) {
  return h("pre", { class: "code", tabindex: "0", role: "group", "aria-label": "Code" }, h("code", {}, text));
}
