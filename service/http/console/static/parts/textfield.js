// A field for a text, with a limit that says so before the page would freeze.

import { bytes, count, h, put, unique } from "../dom.js";

/** Characters. Far more than any model here reads, and still quick to draw. */
export const LIMIT = 100_000;

/**
 * A text area. onTooLong: called with a file that was dropped on it, and with what was pasted and is too long
 * as a file, if that is wanted; `offer` says so on a button.
 * Returns `{element, input, value}`.
 */
export function textField({ label, rows = 5, value = "", placeholder = "", limit = LIMIT, onTooLong = null, offer = "" }) {
  const id = unique("text");
  const notice = h("div", { role: "alert" });
  const input = h("textarea", {
    id, rows, placeholder, value, spellcheck: "false",
    on: {
      paste: (event) => check(event, event.clipboardData),
      drop: (event) => {
        const [file] = event.dataTransfer.files;
        if (!file) check(event, event.dataTransfer);
        else if (onTooLong) onTooLong(file);
      },
      input: () => {
        if (input.value.length <= limit) {
          put(notice);
          return;
        }
        const text = input.value;
        input.value = text.slice(0, limit);
        refuse(text, `This field takes ${count(limit)} characters, so the rest was cut off.`);
      },
    },
  });

  function check(event, data) {
    const text = data?.getData("text/plain") ?? "";
    const length = input.value.length - (input.selectionEnd - input.selectionStart) + text.length;
    if (length <= limit) return;
    event.preventDefault();
    refuse(text, `This text has ${count(text.length)} characters (${bytes(new Blob([text]).size)}). The field takes ${count(limit)}, and a model reads far fewer.`);
  }

  function refuse(text, message) {
    const file = () => new File([text], "pasted.txt", { type: "text/plain" });
    put(
      notice,
      h(
        "div",
        { class: "box warn" },
        h("p", {}, message),
        onTooLong && h("button", { type: "button", on: { click: () => { put(notice); onTooLong(file()); } } }, offer),
      ),
    );
  }

  const element = h("div", { class: "field" }, h("label", { for: id, class: "name" }, label), input, notice);
  return {
    element,
    input,
    get value() {
      return input.value;
    },
    set value(text) {
      input.value = text.slice(0, limit);
      put(notice);
    },
  };
}
