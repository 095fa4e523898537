// A second revision that reads some of an adapter's texts: started, watched, promoted or ended.

import * as api from "../api.js";
import { brief, count, counted, h, percent, put, score, unique } from "../dom.js";
import { announce, errorBox } from "../shell.js";
import { moment } from "./when.js";

const SECONDS = 3;
const RULE = [
  ["max_error_rate", "at most this share of its texts fails", 0.02],
  ["max_disagreement", "at most this share gets another answer", 0.2],
  ["max_latency_ratio", "at most this many times the served revision's latency", 2],
  ["min_texts", "nothing is decided on fewer texts", 30],
  ["window_seconds", "seconds that are looked at", 600],
];

/**
 * The section of one adapter's page. act: asks, does and shows what went wrong (`adapter.js`).
 * Returns `{element, close}`.
 */
export function trafficSection({ name, detail, act, context }) {
  const path = `v1/adapters/${encodeURIComponent(name)}`;
  const now = h("div");
  const form = h("div");
  let timer = 0;
  let isOver = false;
  let shown = "";
  put(form, startForm());
  watch();
  return {
    element: h("section", { class: "card", "aria-label": "Traffic" }, h("h2", {}, "Try a second revision"), now, form),
    close: () => { isOver = true; clearTimeout(timer); },
  };

  async function watch() {
    clearTimeout(timer);
    // One look that fails is no end of the trial.
    let goesOn = shown !== "" && JSON.parse(shown).state === "active";
    try {
      if (document.hidden && shown) return;
      const traffic = await api.get(`${path}/traffic`, { signal: context.signal, ask: false });
      show(traffic);
      goesOn = traffic.state === "active";
    } catch (error) {
      if (error.name === "AbortError" || isOver) return;
      if (error.type === "traffic_not_found") goesOn = false;
      if (error.type === "traffic_not_found") put(now, h("p", { class: "muted" }, "The served revision reads all texts. A second one can read some of them: as a canary it answers them, as a shadow it is only compared."));
      else if (error.status) put(now, errorBox(error));
    } finally {
      if (!isOver && (goesOn || (document.hidden && shown))) timer = setTimeout(watch, 1000 * SECONDS);
    }
  }

  /** While the person thinks, another trial may begin. The routes that end one do not name it. */
  async function isTried(revision) {
    const traffic = await api.get(`${path}/traffic`, { signal: context.signal });
    if (traffic.state === "active" && traffic.revision === revision) return;
    throw new api.ApiError(412, { type: "precondition_failed", message: `${brief(revision)} is tried no longer.` });
  }

  function show(traffic) {
    const text = JSON.stringify(traffic);
    if (text === shown || isOver) return;
    const wasActive = shown && JSON.parse(shown).state === "active";
    shown = text;
    put(now, traffic.state === "active" ? active(traffic) : ended(traffic));
    if (wasActive && traffic.ended) announce(`The trial has ended: ${traffic.ended.reason}`, { urgent: true });
  }

  function active(traffic) {
    const { revision, percent: share, shadow, since, figures } = traffic;
    const isOnlyStaged = share === 0;
    return [
      h(
        "p",
        {},
        h("span", { class: "state trial" }, isOnlyStaged ? "staged" : shadow ? "shadow" : "canary"),
        " ",
        h("code", { title: revision }, brief(revision)),
        isOnlyStaged ? " is stored and reads no text." : ` reads ${share} % of the texts and ${shadow ? "answers none" : "answers them"}.`,
        since ? h("span", { class: "muted" }, [" Since ", moment(since), "."]) : null,
      ),
      figures && !isOnlyStaged ? figuresTable(figures) : null,
      h(
        "div",
        { class: "row" },
        h("button", { class: "primary", on: { click: promote } }, "Make it the served one"),
        h("button", { on: { click: end } }, isOnlyStaged ? "Forget the trial" : "End the trial"),
      ),
    ];

    function promote() {
      act({ title: `Serve ${brief(revision)}?`, body: `${brief(revision)} answers all texts of ${name} from now on, in place of ${brief(traffic.current)}.`, action: "Serve it", run: async (match) => { await isTried(revision); await api.post(`${path}/traffic/promote`, undefined, { headers: match }); }, done: `${name} serves ${brief(revision)} now.` });
    }

    function end() {
      act({ title: "End the trial?", body: `${brief(traffic.current)} reads all texts again. ${brief(revision)} stays stored.`, action: "End it", run: async (match) => { await isTried(revision); await api.delete(`${path}/traffic`, { headers: match }); }, done: "The trial has ended." });
    }
  }

  function ended(traffic) {
    return [
      h("p", {}, `The last trial, of ${brief(traffic.revision)}, has ended: `, h("strong", {}, traffic.ended.cause), ". ", traffic.ended.reason, h("span", { class: "muted" }, [" ", moment(traffic.ended.at)])),
      traffic.figures ? figuresTable(traffic.figures) : null,
    ];
  }

  function startForm() {
    const others = detail.versions.filter(({ revision, reason }) => revision !== detail.revision && reason === null);
    if (!others.length) return h("p", { class: "small muted" }, "There is no other revision that could be tried: upload one and choose \u201cCompare its answers first\u201d, or stage it.");
    const ids = { revision: unique("revision"), percent: unique("percent") };
    const revision = h("select", { id: ids.revision }, others.map((version) => h("option", { value: version.revision }, `${brief(version.revision)} · ${version.stored.slice(0, 10)}${version.who ? ` · ${version.who}` : ""}`)));
    const share = h("input", { id: ids.percent, type: "number", min: 0, max: 100, step: "any", value: 5, required: true });
    const shadow = h("input", { type: "checkbox", checked: true });
    const rule = RULE.map(([field, meaning, usual]) => {
      const id = unique(field);
      return { field, input: h("input", { id, type: "number", min: 0, step: "any", value: usual, placeholder: "no limit" }), label: h("label", { for: id, class: "name" }, meaning) };
    });
    const outcome = h("div");
    const start = h("button", { type: "submit" }, "Start the trial");
    return h(
      "details",
      {},
      h("summary", {}, "Start a trial, or change it"),
      h(
        "form",
        { on: { submit } },
        h("div", { class: "row end-aligned" }, h("div", {}, h("label", { for: ids.revision, class: "name" }, "Revision"), revision), h("div", {}, h("label", { for: ids.percent, class: "name" }, "Percent of the texts"), share)),
        h("label", { class: "check" }, shadow, "shadow: it only reads, and its answers are compared"),
        h("details", {}, h("summary", {}, "When it ends by itself"), h("div", { class: "rule" }, rule.map(({ label, input }) => h("div", { class: "field" }, label, input)))),
        outcome,
        h("div", { class: "row" }, start),
      ),
    );

    async function submit(event) {
      event.preventDefault();
      const limits = Object.fromEntries(rule.map(({ field, input }) => [field, input.value === "" ? null : Number(input.value)]));
      const body = { revision: revision.value, percent: Number(share.value), shadow: shadow.checked, rule: limits };
      start.disabled = true;
      try {
        const traffic = await api.put(`${path}/traffic`, body, { headers: { "If-Match": `"${detail.revision}"` }, signal: context.signal });
        put(outcome);
        show(traffic);
        announce("The trial has begun.");
        watch();
      } catch (error) {
        if (error.name !== "AbortError") put(outcome, errorBox(error));
      } finally {
        start.disabled = false;
      }
    }
  }
}

function figuresTable({ current, canary, shadow, dropped, compared, disagreements, disagreement_rate: rate, disagreement_low: low, disagreement_high: high, score_difference: difference, directions }) {
  const role = (name, { texts, errors, latency_ms: latency }) =>
    h("tr", {}, h("th", { scope: "row" }, name), h("td", { class: "figure" }, count(texts)), h("td", { class: "figure" }, count(errors)), h("td", { class: "figure" }, latency === null ? "–" : `${latency.toFixed(1)} ms`));
  return [
    h(
      "div",
      { class: "scroll", tabindex: "0", role: "region", "aria-label": "Figures of the trial" },
      h(
        "table",
        { class: "plain" },
        h("thead", {}, h("tr", {}, ["", "texts", "failed", "latency"].map((title) => (title ? h("th", { scope: "col", class: "figure" }, title) : h("td", {}))))),
        h("tbody", {}, role("the served one answered", current), role("the second one answered", canary), role("read beside the answer", shadow)),
      ),
    ),
    h(
      "p",
      {},
      `${counted(compared, "text")} compared, ${count(disagreements)} with another answer`,
      rate === null ? "" : ` (${percent(rate)}, likely between ${percent(low)} and ${percent(high)})`,
      dropped ? `, ${count(dropped)} left out` : "",
      difference === null ? "." : `. Its score for the served one's answer is ${difference < 0 ? "lower" : "higher"} by ${score(Math.abs(difference))} on average.`,
    ),
    directions.length ? h("p", { class: "small" }, "Most often: ", directions.slice(0, 5).map(({ before, after, texts }, at) => [at ? ", " : null, h("span", { class: "label" }, before || "nothing"), " → ", h("span", { class: "label" }, after || "nothing"), ` ${count(texts)}`])) : null,
  ];
}
