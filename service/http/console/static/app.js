// The shell: navigation, routes and shortcuts. A page is a module of `pages/` with
// `mount(root, params, context)`, which returns what takes it down again.
//
//   params   {path: ["rest", "of", "the", "route"], query: URLSearchParams}
//   context  {setQuery, go, signal}; everything else a page imports: api.js, dom.js, shell.js, parts/

import { events } from "./api.js";
import { h, put } from "./dom.js";
import { announce, banner, errorBox, furniture, keyButton, showShortcuts, themeButton } from "./shell.js";

const pages = new Map();

/** Register a page. letter: after `g` it opens the page. */
function page(name, title, letter, load) {
  pages.set(name, { name, title, letter, load });
}

page("try", "Try", "t", () => import("./pages/try.js"));
page("adapters", "Adapters", "a", () => import("./pages/adapters.js"));
page("compare", "Compare", "c", () => import("./pages/compare.js"));
page("live", "Live", "l", () => import("./pages/live.js"));

const FIRST = "try";
// The header and an empty page are in index.html, where they are painted before this runs.
const main = document.getElementById("main");
const links = new Map([...pages.keys()].map((name) => [name, document.querySelector(`nav a[href="#/${name}"]`)]));

document.querySelector(".skip").addEventListener("click", skip);
document.querySelector(".tools").replaceChildren(
  document.querySelector(".tools a"),
  keyButton(),
  themeButton(),
  h("button", { class: "quiet", title: "Keyboard shortcuts", on: { click: help } }, "Keys ?"),
);
main.before(banner);
document.body.append(...furniture);

function skip(event) {
  event.preventDefault();
  main.focus();
}

let unmount = null;
let turn = 0;
let leaving = new AbortController();

async function show({ first = false } = {}) {
  let address = location.hash;
  const [, route = FIRST, search = ""] = /^#\/([^?]*)(?:\?(.*))?$/.exec(address) ?? [];
  const [name, ...path] = route.split("/").map(decoded);
  const chosen = pages.get(name || FIRST);
  const mine = (turn += 1);
  // The address changes at once, `hashchange` comes later: in between a page is shown that was left.
  const isLeft = () => mine !== turn || location.hash !== address;
  leaving.abort();
  leaving = new AbortController();
  unmount?.();
  unmount = null;
  for (const [link, element] of links) {
    if (link === chosen?.name) element.setAttribute("aria-current", "page");
    else element.removeAttribute("aria-current");
  }
  if (chosen === undefined) {
    document.title = "No such page · ID-SPAM";
    put(main, h("h1", {}, "No such page"), h("p", {}, h("a", { href: `#/${FIRST}` }, "Go to the first page")));
    return;
  }
  document.title = `${chosen.title} · ID-SPAM`;
  const root = h("div");
  const context = {
    signal: leaving.signal,
    /** Keep what is chosen in the address, without a new entry in the history. */
    setQuery(query) {
      if (isLeft()) return;
      const text = new URLSearchParams(query).toString().replaceAll("%40", "@");
      history.replaceState(null, "", `#/${route}${text ? `?${text}` : ""}`);
      address = location.hash;
    },
    /** Open another route, unless a person has opened one since. */
    go(hash) {
      if (!isLeft()) location.hash = hash;
    },
  };
  try {
    const module = await chosen.load();
    if (mine !== turn) return;
    put(main, root);
    const done = await module.mount(root, { path, query: new URLSearchParams(search) }, context);
    if (mine !== turn) done?.();
    else unmount = done ?? null;
  } catch (error) {
    if (mine !== turn || error.name === "AbortError") return;
    // A module that could not be fetched: the service has gone, or the page is older than it.
    if (error instanceof TypeError) events.dispatchEvent(new CustomEvent("gone", { detail: null }));
    put(main, h("h1", {}, chosen.title), errorBox(error, h("button", { on: { click: () => show() } }, "Try again")));
  }
  if (first) {
    performance.mark("console-ready");
  } else {
    main.focus({ preventScroll: true });
    scrollTo(0, 0);
    announce(chosen.title);
  }
}

function decoded(part) {
  try {
    return decodeURIComponent(part);
  } catch {
    return part;
  }
}

const singleKeys = {
  on: stored() !== "off",
  set(on) {
    singleKeys.on = on;
    try {
      localStorage.setItem("idspam.keys", on ? "on" : "off");
    } catch {
      // Not kept, but in force.
    }
  },
};

function stored() {
  try {
    return localStorage.getItem("idspam.keys");
  } catch {
    return null;
  }
}

function help() {
  const rows = [...pages.values()].map(({ letter, title }) => [["g", letter], title]);
  rows.push(
    [["/"], "Search adapters"],
    [["Ctrl Enter"], "Send what the page asks for"],
    [["Escape"], "Close a list or dialog"],
    [["?"], "This list"],
  );
  showShortcuts(rows, singleKeys);
}

let pressedG = 0;

document.addEventListener("keydown", (event) => {
  if ((event.ctrlKey || event.metaKey) && event.key === "Enter") {
    const button = main.querySelector("button[data-send]:not(:disabled)");
    if (button && !document.querySelector("dialog[open]")) {
      event.preventDefault();
      button.click();
    }
    return;
  }
  const isTyping = event.target.closest("input:not([type=checkbox], [type=radio], [type=file]), textarea, select, [contenteditable]");
  if (!singleKeys.on || isTyping || event.ctrlKey || event.metaKey || event.altKey || document.querySelector("dialog[open]")) return;
  if (event.key === "?") {
    event.preventDefault();
    help();
  } else if (event.key === "/") {
    const search = main.querySelector("[data-search]");
    if (search) {
      event.preventDefault();
      search.focus();
    }
  } else if (event.key === "g") {
    pressedG = event.timeStamp;
  } else if (event.timeStamp - pressedG < 1500) {
    pressedG = 0;
    const chosen = [...pages.values()].find(({ letter }) => letter === event.key);
    if (chosen) location.hash = `#/${chosen.name}`;
  }
});

// A file that is dropped beside its place must not replace the page.
for (const name of ["dragover", "drop"]) {
  document.addEventListener(name, (event) => {
    if (event.dataTransfer?.types.includes("Files")) event.preventDefault();
  });
}
addEventListener("hashchange", () => show());
show({ first: true });
