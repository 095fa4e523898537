// A place for files: dropped on it, or chosen.

import { h } from "../dom.js";

/** A labelled area. onFiles: called with at least one. accept, multiple: as of a file input. */
export function dropArea({ label, hint, accept, multiple = false, onFiles }) {
  const give = (files) => { if (files.length) onFiles(multiple ? files : files.slice(0, 1)); };
  const input = h("input", { type: "file", accept, multiple, on: { change: () => { give([...input.files]); input.value = ""; } } });
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
          give([...event.dataTransfer.files]);
        },
      },
    },
    h("span", { class: "strong" }, label),
    h("span", { class: "small muted" }, hint),
    input,
  );
  return area;
}
