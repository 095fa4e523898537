// Prometheus' text format, and what one scrape of this service comes to.

const LINE = /^([a-zA-Z_:][\w:]*)(?:\{(.*)\})?\s+(\S+)(?:\s+-?\d+)?\s*$/;
const LABEL = /\s*([a-zA-Z_]\w*)="((?:[^"\\]|\\.)*)"\s*,?/gy;
const ESCAPES = { n: "\n", '"': '"', "\\": "\\" };

/** Every sample by the name of its series: `Map(name -> [{labels, value}])`. What is no sample is skipped. */
export function parse(text) {
  const series = new Map();
  for (const line of text.split("\n")) {
    if (line === "" || line[0] === "#") continue;
    const match = LINE.exec(line);
    if (match === null) continue;
    const labels = labelsOf(match[2] ?? "");
    const value = numberOf(match[3]);
    if (labels === null || value === null) continue;
    if (!series.has(match[1])) series.set(match[1], []);
    series.get(match[1]).push({ labels, value });
  }
  return series;
}

function labelsOf(text) {
  const labels = {};
  LABEL.lastIndex = 0;
  while (LABEL.lastIndex < text.length) {
    const match = LABEL.exec(text);
    if (match === null) return null;
    labels[match[1]] = match[2].replace(/\\(.)/g, (_, character) => ESCAPES[character] ?? character);
  }
  return labels;
}

function numberOf(text) {
  if (text === "+Inf" || text === "Inf") return Infinity;
  if (text === "-Inf") return -Infinity;
  const value = Number(text);
  return Number.isNaN(value) && text !== "NaN" ? null : value;
}

/** The sum of a histogram's series that `wanted(labels)` accepts: `{count, sum, bounds, below}`, or null. */
export function histogram(series, name, wanted = () => true) {
  const below = new Map();
  for (const { labels, value } of series.get(`${name}_bucket`) ?? []) {
    if (!wanted(labels)) continue;
    const bound = numberOf(labels.le ?? "");
    if (bound !== null) below.set(bound, (below.get(bound) ?? 0) + value);
  }
  if (below.size === 0) return null;
  const bounds = [...below.keys()].sort((a, b) => a - b);
  const total = (suffix) => (series.get(name + suffix) ?? []).reduce((sum, { labels, value }) => (wanted(labels) ? sum + value : sum), 0);
  return { count: total("_count"), sum: total("_sum"), bounds, below: bounds.map((bound) => below.get(bound)) };
}

/** The values of a metric by one of its labels, or under "" if it has none. */
export function values(series, name, label = null) {
  const found = {};
  for (const sample of series.get(name) ?? []) {
    const key = label === null ? "" : (sample.labels[label] ?? "");
    found[key] = (found[key] ?? 0) + sample.value;
  }
  return found;
}

/** How much a counter grew; after a restart it counts from zero. */
export function increase(before, now) {
  return now < before ? now : now - before;
}

/** What a histogram counted between two readings, or null if one is missing. */
export function between(before, now) {
  if (!now) return null;
  if (!before || before.bounds.length !== now.bounds.length || now.count < before.count) return now;
  return {
    count: now.count - before.count,
    sum: now.sum - before.sum,
    bounds: now.bounds,
    below: now.below.map((value, at) => value - before.below[at]),
  };
}

/**
 * A quantile, as if observations were spread evenly within each bucket; null without any. Those above
 * the last finite bound count as that bound.
 */
export function quantile(found, share) {
  const total = found?.below.at(-1) ?? 0;
  if (!(total > 0)) return null;
  const rank = share * total;
  let low = 0;
  let counted = 0;
  for (const [at, high] of found.bounds.entries()) {
    const until = found.below[at];
    if (until >= rank) {
      if (!Number.isFinite(high)) return low;
      const inside = until - counted;
      return inside <= 0 ? high : low + ((high - low) * (rank - counted)) / inside;
    }
    low = high;
    counted = until;
  }
  return low;
}

/** The mean of what a histogram counted; null without any. */
export const mean = (found) => (found && found.count > 0 ? found.sum / found.count : null);
