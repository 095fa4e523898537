// A place for one file: dropped on it, or chosen.

import { h } from "../dom.js";

/** A labelled area. onFile: called with the file. accept: as of a file input. */
export function dropArea({ label, hint, accept, onFile }) {
  const input = h("input", { type: "file", accept, on: { change: () => { if (input.files[0]) onFile(input.files[0]); input.value = ""; } } });
  const area = h(
    "label",
    {
      class: "drop",
      on: {
        dragover: (event) => { event.preventDefault(); area.classList.add("over"); },
        dragleave: () => area.classList.remove("over"),
        drop: (event) => {
          event.preventDefault();
          area.classList.remove("over");
          const [file] = event.dataTransfer.files;
          if (file) onFile(file);
        },
      },
    },
    h("span", { class: "strong" }, label),
    h("span", { class: "small muted" }, hint),
    input,
  );
  return area;
}
