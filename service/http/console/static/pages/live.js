// Live: what the service does now, from /metrics, which is read every two seconds while this page is open.

import * as api from "../api.js";
import { bytes, count, duration, h, percent, put } from "../dom.js";
import { announce, errorBox } from "../shell.js";
import { ago, lineChart } from "../parts/chart.js";
import { between, histogram, increase, mean, parse, quantile, values } from "../parts/prometheus.js";
import { Samples, WINDOWS } from "../parts/samples.js";
import { sheet } from "../parts/sheet.js";

const SECONDS = 2;
// Routes on which texts are classified, in all protocols.
const PREDICT = new Set([
  "/v1/predict", "/v1/predict/stream", "/", "/predict", "/invocations", "/adapters/{name}", "/adapters/{name}/predict",
  "/v2/models/{name}/infer", "/v2/models/{name}/versions/{version}/infer", "/classify",
]);
const STAGES = { tokenise: "idspam_tokenize_seconds", queue: "idspam_queue_seconds", inference: "idspam_inference_seconds", request: "idspam_request_seconds" };
const SHAPES = { rows: "idspam_batch_rows", tokens: "idspam_batch_tokens", adapters: "idspam_batch_adapters" };
// Counters of what was refused or failed, and the label that says why.
const REFUSALS = {
  "too much waits": ["idspam_overload_refusals_total", "reason"],
  "key, quota or origin": ["idspam_access_refusals_total", "reason"],
  "the engine": ["idspam_failures_total", "reason"],
};
const GAUGES = { waiting: "idspam_waiting_tokens", limit: "idspam_waiting_tokens_limit", wait: "idspam_estimated_wait_seconds", pace: "idspam_device_tokens_per_second" };
const TIERS = [["active", "on the device"], ["registered", "in host memory"], ["stored", "in the store"]];
const WANTED = [
  ...Object.values(STAGES), ...Object.values(SHAPES), ...Object.values(REFUSALS).map(([name]) => name), ...Object.values(GAUGES),
  "idspam_tier_adapters", "idspam_tier_bytes", "idspam_adapter_evictions_total", "idspam_processes", "idspam_build_info", "idspam_devices",
];

// Kept while the console is open, so that coming back to this page shows what was.
const samples = new Samples();
let chosen = WINDOWS[1];
api.events.addEventListener("key", () => samples.clear());

export async function mount(root, params, context) {
  await sheet(new URL("live.css", import.meta.url).href);
  const asked = Number(params.query.get("window"));
  chosen = WINDOWS.find(({ seconds }) => seconds === asked) ?? chosen;
  const charts = makeCharts();
  const tables = makeTables();
  const facts = h("p", { class: "muted" });
  const trouble = h("div");
  const board = h("div", { class: "board" }, charts.map(({ element }) => element), tables.map(({ element }) => element));
  const pause = h("button", { "aria-pressed": "false", on: { click: toggle } }, "Pause");
  const select = h(
    "select",
    { on: { change: choose } },
    WINDOWS.map((window, at) => h("option", { value: String(at), selected: window === chosen }, window.name)),
  );
  put(
    root,
    h("h1", {}, "Live"),
    h("div", { class: "row controls" }, h("label", { class: "inline" }, "Show the last ", select), pause),
    facts,
    trouble,
    board,
  );

  let isPaused = false;
  let timer = 0;
  let isScraping = false;
  draw();
  scrape();

  async function scrape({ ask = false } = {}) {
    if (isScraping) return;
    isScraping = true;
    clearTimeout(timer);
    const began = performance.now();
    try {
      const response = await api.send("GET", "metrics", { query: { "name[]": WANTED }, signal: context.signal, ask });
      samples.add(read(parse(await response.text())));
      put(trouble);
      if (!isPaused) draw();
    } catch (error) {
      if (error.name === "AbortError") return;
      show(error);
    } finally {
      isScraping = false;
      if (!context.signal.aborted) timer = setTimeout(scrape, Math.max(500, 1000 * SECONDS - (performance.now() - began)));
    }
  }

  function show(error) {
    if (trouble.dataset.shown === error.message && trouble.firstChild) return;
    trouble.dataset.shown = error.message;
    const isAboutKey = error.status === 401 || error.status === 403;
    put(
      trouble,
      errorBox(error, isAboutKey ? h("button", { on: { click: () => scrape({ ask: true }) } }, "Use another key") : null),
      isAboutKey ? h("p", {}, "This page reads ", h("code", {}, "/metrics"), ", which needs a key with the scope ", h("code", {}, "metrics"), ".") : null,
    );
  }

  function choose() {
    chosen = WINDOWS[Number(select.value)];
    context.setQuery({ window: chosen.seconds });
    draw();
    announce(`The last ${chosen.name}`);
  }

  function toggle() {
    isPaused = !isPaused;
    pause.setAttribute("aria-pressed", String(isPaused));
    pause.textContent = isPaused ? "Go on" : "Pause";
    if (!isPaused) draw();
  }

  function draw() {
    const readings = samples.within(chosen);
    const view = viewOf(readings);
    for (const chart of charts) chart.draw(view);
    for (const table of tables) table.draw(view);
    const last = samples.last;
    facts.textContent = last === null ? "Reading…" : factsOf(last, readings);
  }

  const back = () => scrape();
  api.events.addEventListener("back", back);
  return () => {
    clearTimeout(timer);
    api.events.removeEventListener("back", back);
  };
}

/** One scrape, as far as this page shows it. */
function read(series) {
  const isPrediction = ({ route }) => route === undefined || PREDICT.has(route);
  const entries = (names, of) => Object.fromEntries(Object.entries(names).map(([key, name]) => [key, of(name)]));
  return {
    at: performance.now() / 1000,
    stages: entries(STAGES, (name) => histogram(series, name, isPrediction)),
    shapes: entries(SHAPES, (name) => histogram(series, name)),
    refusals: entries(REFUSALS, ([name, label]) => values(series, name, label)),
    gauges: entries(GAUGES, (name) => values(series, name)[""] ?? null),
    tiers: { adapters: values(series, "idspam_tier_adapters", "tier"), bytes: values(series, "idspam_tier_bytes", "tier"), evictions: values(series, "idspam_adapter_evictions_total", "tier") },
    processes: values(series, "idspam_processes", "kind"),
    build: series.get("idspam_build_info")?.[0]?.labels ?? {},
    // Each device has a series; alike ones on a CPU share it.
    devices: (series.get("idspam_build_info") ?? []).map(({ labels }) => labels.device).sort(),
    expected: values(series, "idspam_devices")[""] ?? 1,
  };
}

/** What a window's readings come to: one step for each two neighbours, and all of it together. */
function viewOf(readings) {
  const last = readings.at(-1) ?? null;
  const steps = readings.slice(1).map((now, at) => {
    const before = readings[at];
    return { before, now, seconds: now.at - before.at, ago: last.at - now.at };
  });
  return { last, first: readings[0] ?? null, steps, times: steps.map((step) => step.ago), seconds: last ? last.at - readings[0].at : 0 };
}

const found = (step, group, name) => between(step.before[group][name], step.now[group][name]);
const decimal = (digits) => (value) => (value === null ? "–" : value.toLocaleString("en", { maximumFractionDigits: digits }));
const time = (value) => (value === null ? "–" : duration(value));

function makeCharts() {
  const chart = (options, rows) => {
    const made = lineChart(options);
    return { element: made.element, draw: (view) => made.update(view.times, rows.map((row) => view.steps.map(row))) };
  };
  const stage = (name, title, note) =>
    chart({ title, lines: ["p50", "p95"], format: time, note }, [0.5, 0.95].map((share) => (step) => quantile(found(step, "stages", name), share)));
  const shape = (name, title, note = null) =>
    chart({ title, lines: ["mean", "p95"], format: decimal(1), note }, [
      (step) => mean(found(step, "shapes", name)),
      (step) => quantile(found(step, "shapes", name), 0.95),
    ]);
  return [
    chart({ title: "Texts per second", lines: ["texts"], format: decimal(1), note: "That went through the device, in all protocols." }, [
      (step) => (found(step, "shapes", "rows")?.sum ?? 0) / step.seconds,
    ]),
    stage("request", "Latency of a request", "From its first byte to the last of its answer, of routes that classify."),
    stage("tokenise", "Latency: tokenising", null),
    stage("queue", "Latency: queue", "A text's wait for its batch."),
    stage("inference", "Latency: inference", "One batch on the device."),
    shape("rows", "Texts in a batch"),
    shape("tokens", "Tokens in a batch", "With the positions of prompts."),
    shape("adapters", "Adapters in a batch", "Different ones that one forward pass serves."),
    chart({ title: "Tokens that wait", lines: ["waiting"], format: decimal(0) }, [(step) => step.now.gauges.waiting]),
  ];
}

function makeTables() {
  return [queueTable(), tierTable(), refusalTable()];
}

function tableCard(title, columns, note = null) {
  const body = h("tbody");
  const foot = h("p", { class: "small muted" }, note);
  const element = h(
    "section",
    { class: "card", "aria-label": title },
    h("h2", {}, title),
    h("table", { class: "plain" }, h("thead", {}, h("tr", {}, columns.map((name) => (name ? h("th", { scope: "col" }, name) : h("td", {}))))), body),
    foot,
  );
  return { element, body, foot };
}

const row = (name, ...cells) => h("tr", {}, h("th", { scope: "row" }, name), cells.map((cell) => h("td", { class: "figure" }, cell)));

function queueTable() {
  const { element, body } = tableCard("Queue", ["", "now"]);
  return {
    element,
    draw({ last }) {
      if (last === null) return;
      const { waiting, limit, wait, pace } = last.gauges;
      put(
        body,
        row("tokens that wait", waiting === null ? "–" : count(waiting)),
        row("of at most", limit ? `${count(limit)} (${percent((waiting ?? 0) / limit)})` : "–"),
        row("a further short text would take", time(wait)),
        row("the device runs, in full batches", pace ? `${count(Math.round(pace))} tokens/s` : "not measured yet"),
      );
    },
  };
}

function tierTable() {
  const { element, body, foot } = tableCard("Where adapters are", ["", "adapters", "size", "evicted"]);
  return {
    element,
    draw({ last, first }) {
      if (last === null) return;
      const { adapters, bytes: sizes, evictions } = last.tiers;
      const evicted = (tier) => increase(first?.tiers.evictions[tier] ?? 0, evictions[tier] ?? 0);
      put(body, TIERS.map(([tier, name]) => row(name, count(adapters[tier] ?? 0), bytes(sizes[tier] ?? 0), tier === "stored" ? "" : count(evicted(tier)))));
      foot.textContent = "Evicted: within the time shown.";
    },
  };
}

function refusalTable() {
  const { element, body, foot } = tableCard("Refused and failed", ["by reason", "in this time", "since the start"]);
  return {
    element,
    draw({ last, first, seconds }) {
      if (last === null) return;
      const rows = Object.entries(last.refusals).flatMap(([group, now]) =>
        Object.entries(now)
          .filter(([, total]) => total > 0)
          .map(([reason, total]) => ({ name: `${group}: ${reason.replaceAll("_", " ")}`, recent: increase(first.refusals[group]?.[reason] ?? 0, total), total })),
      );
      rows.sort((a, b) => b.recent - a.recent || b.total - a.total);
      put(body, rows.length ? rows.map(({ name, recent, total }) => row(name, count(recent), count(total))) : row("nothing", "0", "0"));
      foot.textContent = `Requests, of the engine texts; this time: the last ${ago(seconds).replace(" ago", "")}.`;
    },
  };
}

function factsOf({ build, devices, expected, processes }, readings) {
  const missing = expected > 1 && "engine" in processes ? expected - processes.engine : 0;
  const engines = Object.entries(processes)
    .filter(([, alive]) => alive > 0)
    .map(([kind, alive]) => (alive > 1 ? `${alive} ${kind}s` : kind));
  const parts = [
    build.backbone && `${build.backbone} on ${devices.join(", ")}, ${build.dtype}`,
    missing > 0 ? `${missing} of ${expected} devices missing` : null,
    build.version && `version ${build.version}`,
    engines.length ? `processes: ${engines.join(", ")}` : null,
    readings.length < 2 ? "figures need two readings, two seconds apart" : null,
  ];
  return parts.filter(Boolean).join(" · ");
}
