// A request as code that runs as it is: with curl, and with the project's own client.

import * as api from "../api.js";
import { h, put, unique } from "../dom.js";
import { copy } from "../shell.js";

/** The command; the key stays in the environment, where it belongs. */
export function asCurl(body) {
  const key = api.hasKey() ? ' \\\n  -H "Authorization: Bearer $ID_SPAM_API_KEY"' : "";
  return `curl ${shell(`${api.address}/v1/predict`)} \\\n  -H 'Content-Type: application/json'${key} \\\n  -d ${shell(JSON.stringify(body))}`;
}

function shell(text) {
  return `'${text.replaceAll("'", "'\\''")}'`;
}

/** A program. */
export function asPython({ inputs, adapter, ...options }) {
  const items = [inputs].flat().map(input);
  const plain = items.length === 1 ? items[0] : `[\n        ${items.join(",\n        ")},\n    ]`;
  const needsInput = items.some((item) => item.startsWith("Input("));
  const set = Object.entries(options).map(([name, value]) => `${name}=${python(value)}`);
  const passed = [plain, adapter ? python(adapter) : null, ...set].filter(Boolean).join(", ");
  const key = api.hasKey() ? ', api_key=os.environ["ID_SPAM_API_KEY"]' : "";
  return [
    ...(api.hasKey() ? ["import os", ""] : []),
    `from service.client import Client${needsInput ? ", Input" : ""}`,
    "",
    `with Client(${python(api.address)}${key}) as client:`,
    `    answer = client.predict(${passed})`,
    "    for result in answer:",
    "        print(result.adapter, result.label, result.score)",
  ].join("\n");
}

function input(item) {
  if (typeof item === "string") return python(item);
  const { text, ...rest } = item;
  return `Input(${[python(text), ...Object.entries(rest).map(([name, value]) => `${name}=${python(value)}`)].join(", ")})`;
}

/** A literal; strings of JSON are strings of Python. */
function python(value) {
  if (value === true) return "True";
  if (value === false) return "False";
  if (value === null) return "None";
  return JSON.stringify(value);
}

/** Both, with tabs and buttons to copy. `set(body)` shows another request. */
export function snippets() {
  const kinds = [["curl", asCurl], ["Python", asPython]];
  const panel = unique("code");
  const code = h("code");
  let shown = 0;
  let body = null;
  const tabs = kinds.map(([name], at) =>
    h("button", {
      type: "button", role: "tab", id: `${panel}-${at}`, "aria-controls": panel,
      on: { click: () => show(at), keydown: (event) => { if (event.key.startsWith("Arrow")) { show(1 - shown); tabs[shown].focus(); } } },
    }, name),
  );
  function show(at) {
    shown = at;
    tabs.forEach((tab, index) => {
      tab.setAttribute("aria-selected", String(index === at));
      tab.tabIndex = index === at ? 0 : -1;
    });
    pre.setAttribute("aria-labelledby", `${panel}-${at}`);
    code.textContent = body === null ? "" : kinds[at][1](body);
  }
  const pre = h("pre", { id: panel, role: "tabpanel", class: "code", tabindex: "0" }, code);
  const element = h(
    "details",
    { class: "card" },
    h("summary", {}, "This request as code"),
    h("div", { class: "row spread" }, h("div", { class: "tabs", role: "tablist", "aria-label": "Language" }, tabs), h("button", { type: "button", on: { click: () => copy(code.textContent) } }, "Copy")),
    pre,
  );
  show(0);
  return {
    element,
    set(next) {
      body = next;
      element.hidden = body === null;
      show(shown);
    },
  };
}
