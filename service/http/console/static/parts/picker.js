// A combobox for adapters that asks the service while one types, so that ten thousand of them are no
// more work than four.

import * as api from "../api.js";
import { calmly, count, counted, h, put, released, unique } from "../dom.js";
import { announce, errorBox } from "../shell.js";
import { nameOf } from "./catalog.js";

const PAGE = 50;
const MOST_ROWS = 500;
const REFERENCE = /^[a-z0-9][a-z0-9._-]{0,63}(@[0-9a-f]{1,64})?$/;

/**
 * A field for one adapter or several.
 *
 * value: references (`name` or `name@revision`). most: how many. onChange: called with all of them.
 * Returns `{element, value}`; `value` can be set.
 */
export function adapterPicker({ label, value = [], most = 1, onChange = () => {}, hint = null }) {
  const ids = { input: unique("adapter"), list: unique("adapters"), note: unique("note") };
  let chosen = [...value];
  let rows = [];
  let active = -1;
  let asked = null;
  let cursor = null;
  // What was typed when the rows were asked for, and whether Enter waits for rows.
  let answered = null;
  let entered = false;

  const input = h("input", {
    id: ids.input, type: "text", role: "combobox", autocomplete: "off", spellcheck: "false", autocapitalize: "none",
    "aria-expanded": "false", "aria-controls": ids.list, "aria-autocomplete": "list", "aria-describedby": ids.note,
    placeholder: "Search adapters", "data-search": true,
    on: { focus: open, click: reopen, input: calmly(typing, 120), keydown: key, blur: close },
  });
  const chips = h("ul", { class: "chips", "aria-label": `Chosen: ${label}` });
  const list = h("ul", {
    id: ids.list, class: "options", role: "listbox", "aria-label": label, "aria-multiselectable": most > 1 ? "true" : null,
    hidden: true, on: { mousedown: (event) => event.preventDefault(), click: clicked, scroll: scrolled },
  });
  // Its line is always there: nothing may move under a click that takes the focus away.
  const note = h("p", { id: ids.note, class: "small muted note" }, hint);
  const trouble = h("div");
  const element = h(
    "div",
    { class: "picker" },
    h("label", { for: ids.input, class: "name" }, label),
    chips,
    h("div", { class: "under" }, input, list),
    note,
    trouble,
  );
  showChips();

  function showChips() {
    chips.hidden = !chosen.length;
    put(
      chips,
      chosen.map((reference) =>
        h(
          "li",
          { class: "chip" },
          shown(reference),
          h("button", { type: "button", class: "quiet", "aria-label": `Remove ${reference}`, on: { click: () => remove(reference) } }, "×"),
        ),
      ),
    );
  }

  function set(references) {
    chosen = references;
    showChips();
    showRows();
    onChange([...chosen]);
  }

  function remove(reference) {
    set(chosen.filter((item) => item !== reference));
    announce(`${reference} removed`);
    input.focus();
  }

  function typing() {
    if (input.value.trim() !== answered) open();
  }

  async function open() {
    if (document.activeElement !== input) return;
    asked?.abort();
    asked = new AbortController();
    const { signal } = asked;
    const typed = input.value.trim();
    try {
      const page = await ask(typed, null, signal);
      await released();
      if (signal.aborted) return;
      rows = page.adapters;
      cursor = page.next_cursor;
      put(trouble);
      note.textContent = rows.length ? `${cursor ? `the first ${count(rows.length)}` : counted(rows.length, "adapter")}${typed ? " with this in the name" : ""}` : "No adapter has this in its name.";
    } catch (error) {
      if (error.name === "AbortError") return;
      rows = [];
      cursor = null;
      put(trouble, errorBox(error));
    }
    // A reference can be used unseen: of a pinned revision, or with a key that may not list.
    const isUnseen = typed.includes("@") || !rows.length;
    if (isUnseen && REFERENCE.test(typed)) rows.unshift({ name: typed, state: "ready", exact: true });
    active = -1;
    answered = typed;
    list.hidden = rows.length === 0;
    input.setAttribute("aria-expanded", String(!list.hidden));
    showRows();
    list.scrollTop = 0;
    if (entered) enter();
  }

  function reopen() {
    if (list.hidden) open();
  }

  /** Take the active row, or the best one for what is typed: as soon as its rows are there. */
  function enter() {
    const typed = input.value.trim();
    if (list.hidden || answered !== typed) {
      entered = typed !== "" && !(entered && answered === typed);
      if (entered) open();
      return;
    }
    entered = false;
    const row = rows[active] ?? (typed ? rows.find(({ name }) => name === typed) ?? rows[0] : null);
    if (row) pick(row);
  }

  function ask(typed, after, signal) {
    const query = { search: nameOf(typed) || null, limit: PAGE, cursor: after };
    return api.get("v1/adapters", { query, signal, ask: "missing" });
  }

  async function scrolled() {
    if (cursor === null || rows.length >= MOST_ROWS || list.scrollTop + list.clientHeight < list.scrollHeight - 80) return;
    const after = cursor;
    const { signal } = asked;
    cursor = null;
    try {
      const page = await ask(input.value.trim(), after, signal);
      await released();
      if (signal.aborted) return;
      rows.push(...page.adapters);
      cursor = page.next_cursor;
      showRows();
      note.textContent = rows.length >= MOST_ROWS ? `the first ${count(rows.length)}: type to find others` : note.textContent.replace(/[\d,]+/, count(rows.length));
    } catch (error) {
      if (error.name !== "AbortError") put(trouble, errorBox(error));
    }
  }

  function showRows() {
    put(
      list,
      rows.map((row, at) =>
        h(
          "li",
          {
            id: `${ids.list}-${at}`, role: "option", "aria-selected": String(chosen.includes(row.name)),
            "aria-disabled": row.state === "ready" ? null : "true", class: at === active ? "active" : null, data: { at },
          },
          h("span", { class: "strong" }, row.exact ? `Use exactly ${row.name}` : row.name),
          h("span", { class: "small muted" }, row.exact ? "" : summary(row)),
        ),
      ),
    );
    showActive();
  }

  function showActive() {
    [...list.children].forEach((item, at) => item.classList.toggle("active", at === active));
    const item = list.children[active];
    if (item) {
      input.setAttribute("aria-activedescendant", item.id);
      item.scrollIntoView({ block: "nearest" });
    } else {
      input.removeAttribute("aria-activedescendant");
    }
  }

  function close() {
    asked?.abort();
    list.hidden = true;
    active = -1;
    entered = false;
    input.setAttribute("aria-expanded", "false");
    input.removeAttribute("aria-activedescendant");
    note.textContent = hint ?? "";
  }

  function pick(row) {
    if (row.state !== "ready") {
      put(trouble, errorBox({ message: `${row.name} cannot be used: ${row.reason ?? row.state}` }));
      return;
    }
    input.value = answered = "";
    if (chosen.includes(row.name)) {
      set(chosen.filter((name) => name !== row.name));
      announce(`${row.name} removed`);
    } else if (most === 1) {
      set([row.name]);
      announce(`${row.name} chosen`);
    } else if (chosen.length >= most) {
      put(trouble, errorBox({ message: `At most ${most} adapters at a time: remove one first.` }));
      return;
    } else {
      set([...chosen, row.name]);
      announce(`${row.name} chosen, ${chosen.length} in all`);
    }
    put(trouble);
    if (most === 1) close();
    else open();
  }

  function clicked(event) {
    const item = event.target.closest("[data-at]");
    if (item) pick(rows[Number(item.dataset.at)]);
  }

  function key(event) {
    if (event.key === "ArrowDown" || event.key === "ArrowUp") {
      event.preventDefault();
      if (list.hidden) {
        open();
        return;
      }
      const step = event.key === "ArrowDown" ? 1 : -1;
      active = Math.max(0, Math.min(rows.length - 1, active + step));
      showActive();
    } else if (event.key === "Enter" && !event.ctrlKey && !event.metaKey) {
      event.preventDefault();
      enter();
    } else if (event.key === "Escape") {
      // Also a list that is on its way.
      close();
    } else if (event.key === "Backspace" && !input.value && chosen.length) {
      remove(chosen.at(-1));
    }
  }

  return {
    element,
    get value() {
      return [...chosen];
    },
    set value(references) {
      set([...references]);
    },
  };
}

/** A reference as it is read by people: long revisions are cut. */
export function shown(reference) {
  const [name, revision] = reference.split("@");
  return revision ? `${name}@${revision.slice(0, 8)}` : name;
}

function summary(row) {
  if (row.state !== "ready") return `${row.state}: ${row.reason ?? "cannot be used"}`;
  return row.labels.length > 4 ? `${count(row.labels.length)} labels` : row.labels.join(", ");
}
