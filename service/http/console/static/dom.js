// Elements from values. Text always becomes text: nothing here, or anywhere else, parses markup.

const SVG = "http://www.w3.org/2000/svg";
// Set as properties, since the attribute only gives the first value or none.
const PROPERTIES = new Set(["value", "checked", "disabled", "selected", "indeterminate", "hidden"]);

/** An element. Attributes by name; `on: {click: f}`, `style: {"--share": 0.5}`; null and false are left out. */
export function h(tag, attributes = {}, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

/** The same for SVG. */
export function s(tag, attributes = {}, ...children) {
  return fill(document.createElementNS(SVG, tag), attributes, children);
}

/** Give an element other children. */
export function put(element, ...children) {
  element.replaceChildren(...nodes(children));
  return element;
}

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes ?? {})) {
    if (name === "on") {
      for (const [event, listener] of Object.entries(value)) element.addEventListener(event, listener);
    } else if (name === "style") {
      for (const [property, set] of Object.entries(value)) element.style.setProperty(property, set);
    } else if (name === "data") {
      Object.assign(element.dataset, value);
    } else if (PROPERTIES.has(name)) {
      element[name] = value;
    } else if (value !== null && value !== undefined && value !== false) {
      element.setAttribute(name, value === true ? "" : value);
    }
  }
  element.append(...nodes(children));
  return element;
}

function nodes(children) {
  return children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false);
}

/** A label that may break after each of its underscores and hyphens. */
export function soft(label) {
  return label.split(/(?<=[_-])/).flatMap((part, at) => (at ? [document.createElement("wbr"), part] : [part]));
}

let last = 0;

/** An id that no other element has. */
export function unique(word) {
  last += 1;
  return `${word}-${last}`;
}

// Made when it is first needed: it takes a millisecond of the first load.
let numbers = null;

/** 12,345 */
export function count(number) {
  numbers ??= new Intl.NumberFormat("en");
  return numbers.format(number);
}

/** "1 text", "2,000 texts" */
export function counted(number, one, many = `${one}s`) {
  return `${count(number)} ${number === 1 ? one : many}`;
}

/** 0.994 */
export function score(number) {
  return number.toFixed(3);
}

/** 12 % with one digit where it says something. */
export function percent(share) {
  const value = 100 * share;
  return `${value > 0 && value < 10 ? value.toFixed(1) : Math.round(value)} %`;
}

/** 1.2 MB */
export function bytes(number) {
  const units = ["bytes", "kB", "MB", "GB", "TB"];
  let value = number;
  let unit = 0;
  while (value >= 1000 && unit < units.length - 1) {
    value /= 1000;
    unit += 1;
  }
  return `${unit && value < 100 ? value.toFixed(1) : Math.round(value)} ${units[unit]}`;
}

/** 3.2 ms, 41 s, 3 min */
export function duration(seconds) {
  if (seconds < 0.01) return `${(1000 * seconds).toFixed(1)} ms`;
  if (seconds < 1) return `${Math.round(1000 * seconds)} ms`;
  if (seconds < 90) return `${Math.round(seconds)} s`;
  if (seconds < 5400) return `${Math.round(seconds / 60)} min`;
  return `${(seconds / 3600).toFixed(1)} h`;
}

/** The first characters of a revision. */
export function brief(revision) {
  return revision ? revision.slice(0, 8) : "none";
}

let pressing = null;

document.addEventListener("pointerdown", () => {
  pressing = new Promise((resolve) => {
    for (const end of ["pointerup", "pointercancel"]) document.addEventListener(end, () => setTimeout(resolve), { once: true });
  });
});

/** Ends when no button is pressed: a click is lost if what is under it moves before the release. */
export const released = () => pressing;

/** Calls `action` once nothing has been asked for `milliseconds`. */
export function calmly(action, milliseconds) {
  let timer = 0;
  return (...values) => {
    clearTimeout(timer);
    timer = setTimeout(() => action(...values), milliseconds);
  };
}
