// One adapter in detail: what it is, its revisions and who made them, and what can be done with it.

import * as api from "../api.js";
import { brief, bytes, count, counted, h, put, score } from "../dom.js";
import { announce, confirm, errorBox, toast } from "../shell.js";
import { forget } from "./catalog.js";
import { changes, number } from "./changes.js";
import { driftSections } from "./drift.js";
import { download as save } from "./files.js";
import { markdown } from "./markdown.js";
import { trafficSection } from "./traffic.js";
import { uploader } from "./upload.js";
import { moment } from "./when.js";

const SECONDS = 5;
const MOST_LABELS = 100;
const DONE = { publish: "published", stage: "staged", promote: "promoted", rollback: "rolled back to", delete_revision: "deleted" };

export async function detailPage(root, name, context) {
  const path = `v1/adapters/${encodeURIComponent(name)}`;
  const head = h("div");
  const notice = h("div", { role: "status" });
  const trouble = h("div");
  const content = h("div");
  const upload = uploader({ name, context, onChanged: refresh });
  let detail = null;
  let traffic = null;
  let timer = 0;

  put(root, h("p", {}, h("a", { href: "#/adapters" }, "All adapters")), head, notice, trouble, upload.element, content);
  put(head, h("h1", {}, name));
  api.events.addEventListener("back", refresh);
  await refresh();
  timer = setTimeout(look, 1000 * SECONDS);
  return () => {
    clearTimeout(timer);
    upload.close();
    traffic?.close();
    api.events.removeEventListener("back", refresh);
  };

  async function refresh() {
    forget(name);
    try {
      show(await api.get(path, { signal: context.signal }));
      put(trouble);
    } catch (error) {
      if (error.name === "AbortError") return;
      fail(error);
      upload.element.hidden = detail === null;
    }
  }

  function show(found) {
    detail = found;
    traffic?.close();
    traffic = trafficSection({ name, detail, act, context });
    put(notice);
    upload.element.hidden = false;
    put(head, header());
    put(content, about(detail), cardSection(), figuresSection(detail), revisions(), traffic.element, driftSections(name, context));
  }

  function fail(error) {
    const show = h("button", { on: { click: refresh } }, error.status === 412 ? "Show what is served now" : "Try again");
    put(trouble, errorBox(error, error.status === 404 && detail === null ? null : show));
    trouble.scrollIntoView({ block: "nearest" });
  }

  /** Look whether somebody else has changed it; what is shown stays until the person wants to see that. */
  async function look() {
    try {
      if (document.hidden || detail === null) return;
      const found = await api.get(path, { signal: context.signal, ask: false });
      if (signature(found) !== signature(detail)) tell(changed(found), found);
      else put(notice);
    } catch (error) {
      if (error.name === "AbortError") return;
      if (error.status === 404) tell(`${name} was deleted meanwhile.`, null);
      else if (error.status === 401 || error.status === 403) tell(error.message, null, "Use another key");
    } finally {
      if (!context.signal.aborted) timer = setTimeout(look, 1000 * SECONDS);
    }
  }

  function tell(text, found, action = "Show it") {
    if (notice.dataset.text === text && notice.firstChild) return;
    notice.dataset.text = text;
    put(notice, h("div", { class: "box warn row spread" }, h("span", {}, text), h("button", { on: { click: () => (found ? show(found) : refresh()) } }, action)));
  }

  function changed(found) {
    const [event] = found.events;
    const who = event?.who ? ` by ${event.who}` : "";
    if (found.revision !== detail.revision) return `${name} serves ${brief(found.revision)} now; this page shows ${brief(detail.revision)}. It was ${DONE[event?.what] ?? "changed"}${who}.`;
    if (found.state !== detail.state) return `${name} is ${found.state} now.`;
    return `The revisions of ${name} were changed${who}.`;
  }

  /**
   * Ask, do, and show the outcome. run: does it, given the headers that make sure the revision that is
   * shown is still the served one.
   */
  async function act({ run, done, gone = false, ...question }) {
    // What the question is about: meanwhile the page may show something newer.
    const { revision } = detail;
    if (!(await confirm(question))) return;
    try {
      await run(revision ? { "If-Match": `"${revision}"` } : {});
    } catch (error) {
      if (error.name !== "AbortError") fail(error);
      return;
    }
    put(trouble);
    toast(done, "good");
    forget(name);
    if (gone) context.go("#/adapters");
    else await refresh();
  }

  function header() {
    const { state, reason, revision } = detail;
    const reference = encodeURIComponent(name);
    return [
      h("div", { class: "row" }, h("h1", {}, name), h("span", { class: `state ${state}` }, state), h("code", { title: revision }, brief(revision))),
      reason ? h("p", { class: "box bad" }, reason) : null,
      h(
        "div",
        { class: "row actions" },
        state === "ready" ? h("a", { class: "button", href: `#/try?adapter=${reference}` }, "Try it") : null,
        h("button", { on: { click: () => download(null) } }, "Download"),
        state === "unloaded" ? h("button", { on: { click: load } }, "Load") : null,
        state === "ready" ? h("button", { on: { click: unload } }, "Unload") : null,
        detail.revisions.length > 1 ? h("button", { on: { click: () => rollBack(null) } }, "Roll back") : null,
        h("button", { class: "danger", on: { click: remove } }, "Delete"),
      ),
    ];
  }

  async function download(revision) {
    try {
      const response = await api.send("GET", `${path}/file`, { query: { revision }, signal: context.signal });
      save(await response.blob(), `${name}-${brief(revision ?? detail.revision)}.safetensors`);
    } catch (error) {
      if (error.name !== "AbortError") fail(error);
    }
  }

  function unload() {
    act({ title: `Unload ${name}?`, body: "Requests for it are refused until it is loaded again, published, or the service restarts. Its files stay. Of several replicas only this one unloads it.", action: "Unload", danger: true, run: () => api.post(`v2/repository/models/${encodeURIComponent(name)}/unload`, {}), done: `${name} is unloaded.` });
  }

  function load() {
    act({ title: `Load ${name}?`, body: "Its files are read and checked again, and it answers.", action: "Load", run: () => api.post(`v2/repository/models/${encodeURIComponent(name)}/load`, {}), done: `${name} is loaded.` });
  }

  function rollBack(revision) {
    const body = revision ? `${brief(revision)} answers in place of ${brief(detail.revision)}.` : `The revision that was served before answers in place of ${brief(detail.revision)}.`;
    act({ title: `Roll ${name} back?`, body, action: "Roll back", run: (match) => api.post(`${path}/rollback`, { revision }, { headers: match }), done: `${name} is rolled back.` });
  }

  function remove() {
    act({ title: `Delete ${name}?`, body: `The name and all its ${counted(detail.revisions.length, "revision")} go. This cannot be undone.`, action: "Delete", danger: true, typed: name, run: (match) => api.delete(path, { headers: match }), done: `${name} is deleted.`, gone: true });
  }

  function removeRevision(revision) {
    act({ title: `Delete revision ${brief(revision)}?`, body: `${name} goes on answering by ${brief(detail.revision)}. This cannot be undone.`, action: "Delete", danger: true, run: (match) => api.delete(`${path}/revisions/${revision}`, { headers: match }), done: `${brief(revision)} is deleted.` });
  }

  function cardSection() {
    const content = h("div", {}, h("p", { class: "muted" }, "Reading…"));
    readCard(content);
    return h("section", { class: "card", "aria-label": "Model card" }, h("h2", {}, "Model card"), content);
  }

  async function readCard(content) {
    try {
      const response = await api.send("GET", `${path}/card`, { signal: context.signal });
      put(content, h("div", { class: "sheet", tabindex: "0", role: "region", "aria-label": "Text of the model card" }, markdown(await response.text())));
    } catch (error) {
      if (error.name === "AbortError") return;
      if (error.status === 404) put(content, h("p", { class: "muted" }, "No model card was stored with this revision. ", h("code", {}, "python -m train fit"), " writes one beside the file, X.md: drop it above to keep it here."));
      else put(content, errorBox(error));
    }
  }

  function revisions() {
    const below = h("div");
    return h(
      "section",
      { class: "card", "aria-label": "Revisions" },
      h("h2", {}, "Revisions"),
      h(
        "div",
        { class: "scroll", tabindex: "0", role: "region", "aria-label": "Stored revisions" },
        h(
          "table",
          { class: "plain revisions" },
          h("thead", {}, h("tr", {}, ["revision", "stored", "by", "kind", "size"].map((column) => h("th", { scope: "col" }, column)), h("td", {}))),
          h("tbody", {}, detail.versions.map((version) => revisionRow(version, below))),
        ),
      ),
      below,
      history(),
    );
  }

  function revisionRow({ revision, stored, who, method, size, reason }, below) {
    const isServed = revision === detail.revision;
    return h(
      "tr",
      {},
      h("th", { scope: "row" }, h("code", { title: revision }, brief(revision)), isServed ? [" ", h("span", { class: `state ${detail.state}` }, "served")] : null, reason && !isServed ? h("div", { class: "small muted reason" }, reason) : null),
      h("td", {}, moment(stored)),
      h("td", {}, who ?? "–"),
      h("td", {}, method ?? "–"),
      h("td", {}, bytes(size)),
      h(
        "td",
        {},
        isServed
          ? null
          : h(
              "div",
              { class: "row" },
              h("button", { class: "small", "aria-label": `What would change with ${brief(revision)}`, on: { click: () => compare(revision, below) } }, "Changes"),
              reason === null ? h("button", { class: "small", "aria-label": `Serve ${brief(revision)}`, on: { click: () => rollBack(revision) } }, "Serve") : null,
              h("button", { class: "small", "aria-label": `Download ${brief(revision)}`, on: { click: () => download(revision) } }, "Download"),
              h("button", { class: "small", "aria-label": `Delete ${brief(revision)}`, on: { click: () => removeRevision(revision) } }, "Delete"),
            ),
      ),
    );
  }

  async function compare(revision, below) {
    try {
      const { difference } = await api.get(`${path}/difference`, { query: { before: detail.revision, after: revision }, signal: context.signal });
      put(below, h("h3", {}, `What ${brief(revision)} would change`), changes(difference, { before: `served now (${brief(detail.revision)})`, after: brief(revision) }));
      announce(`What ${brief(revision)} would change is shown below the list.`);
    } catch (error) {
      if (error.name !== "AbortError") put(below, errorBox(error));
    }
  }

  function history() {
    if (!detail.events.length) return h("p", { class: "small muted" }, "Who did what is not known for these: they were there before this was recorded, or another program has put them there.");
    return [
      h("h3", {}, "What happened"),
      h("ol", { class: "events" }, detail.events.map(({ at, what, revision, who }) => h("li", {}, h("span", { class: "muted" }, moment(at)), " ", h("strong", {}, who ?? "somebody without a key, or the service"), ` ${DONE[what] ?? what} `, h("code", { title: revision }, brief(revision))))),
    ];
  }
}

const signature = ({ revision, state, revisions }) => JSON.stringify([revision, state, revisions]);

function about({ spec, method, size, backbone, revision }) {
  if (spec === null) return null;
  const abstains = spec.decision?.abstain_below;
  const rows = [
    ["kind", method],
    ["backbone", backbone],
    ["several labels a text", spec.activation === "sigmoid" ? "yes: each label has its threshold" : "no: the best one"],
    ["abstains below", abstains === null || abstains === undefined ? null : `${score(abstains)}${spec.decision.precision ? `, for ${number(100 * spec.decision.precision)} % right answers` : ""}`],
    ["temperature", number(spec.calibration.temperature)],
    ["reads at most", `${count(spec.max_length)} tokens`],
    ["prompt", spec.prompt ? `${spec.prompt.kind}, ${counted(spec.prompt.length, "vector")}, at layer ${spec.prompt.layer}` : "none"],
    ["tuning", spec.tuning ? `${spec.tuning.kind}, layers ${spec.tuning.layers[0] + 1} to ${spec.tuning.layers[1]}` : "none"],
    ["trained on", spec.provenance.data],
    ["licence of the data", spec.provenance.data_licence],
    ["trained", spec.provenance.created],
    ["with", spec.provenance.code_version],
    ["command", spec.provenance.command ? h("code", {}, spec.provenance.command) : null],
    ["size", size === null ? null : bytes(size)],
    ["revision", h("code", {}, revision)],
  ];
  return h(
    "section",
    { class: "card", "aria-label": "What it is" },
    h("h2", {}, "What it is"),
    h("dl", { class: "facts" }, rows.filter(([, value]) => value !== null && value !== undefined && value !== "").map(([title, value]) => [h("dt", {}, title), h("dd", {}, value)])),
    labelsOf(spec),
  );
}

function labelsOf(spec) {
  const { labels, activation, thresholds } = spec;
  const list = h("ul", { class: "labels", tabindex: "0", "aria-label": "Labels" });
  const item = (label, at) => h("li", {}, h("span", { class: "label" }, label), activation === "sigmoid" ? h("span", { class: "muted" }, ` from ${score(thresholds?.[at] ?? 0.5)}`) : null);
  put(list, labels.slice(0, MOST_LABELS).map(item));
  const all = h("button", { class: "quiet", on: { click: () => { put(list, labels.map(item)); all.remove(); } } }, `All ${count(labels.length)} labels`);
  return [h("h3", {}, counted(labels.length, "label"), activation === "sigmoid" ? " and the score that each needs" : null), list, labels.length > MOST_LABELS ? all : null];
}

function figuresSection({ spec }) {
  const metrics = Object.entries(spec?.provenance.metrics ?? {});
  if (!metrics.length) return null;
  return h(
    "section",
    { class: "card", "aria-label": "Figures of the training" },
    h("h2", {}, "Figures of the training"),
    h("table", { class: "plain narrow" }, h("tbody", {}, metrics.map(([name, value]) => h("tr", {}, h("th", { scope: "row" }, name), h("td", { class: "figure" }, number(value)))))),
  );
}
