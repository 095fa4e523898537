// Files of texts, read and written piece by piece: plain lines, CSV, TSV and JSON lines, each also .gz.

const KINDS = { txt: "txt", text: "txt", log: "txt", csv: "csv", tsv: "tsv", jsonl: "jsonl", ndjson: "jsonl" };
const MOST_CELL = 8 * 2 ** 20;
const MOST_HEAD = 2 ** 16;
const USUAL_NAMES = ["text", "sentence", "message", "content", "body", "question", "review"];

/** What `accept` of a file input lists. */
export const ACCEPTED = ".txt,.csv,.tsv,.jsonl,.ndjson,.gz";

/** A file that cannot be read; the message says what is wrong and where. */
export class FileFault extends Error {}

/** The kind of a file by its name: "txt", "csv", "tsv" or "jsonl". Throws FileFault. */
export function kindOf(name) {
  const parts = name.toLowerCase().split(".");
  const isPacked = parts.at(-1) === "gz";
  const kind = KINDS[parts.at(isPacked ? -2 : -1)];
  if (parts.length < (isPacked ? 3 : 2) || !kind) throw new FileFault(`${name}: a file of texts ends in .txt, .csv, .tsv or .jsonl, also followed by .gz`);
  return { kind, isPacked };
}

/**
 * The first records of a file: its kind, the names of its columns (of JSON lines: the fields of the
 * first objects; none for plain lines) and the column that is most likely the text.
 */
export async function look(file, most = 5) {
  const { kind } = kindOf(file.name);
  const records = [];
  let columns = [];
  for await (const record of read(file)) {
    columns = record.columns ?? columns;
    if (kind === "jsonl" && record.value && typeof record.value === "object") columns = [...new Set([...columns, ...Object.keys(record.value)])];
    records.push(record);
    if (records.length === most) break;
  }
  if (!records.length) throw new FileFault(`${file.name}: no texts in this file`);
  return { kind, columns, records, text: USUAL_NAMES.find((name) => columns.includes(name)) ?? columns[0] ?? null };
}

/**
 * Every record of a file: `{line, columns, value}`. value: a string of plain lines, an array of cells in
 * the order of `columns`, or what a line of JSON says; in place of it `fault`, a sentence. Lines of JSON
 * have their text as `source`, too.
 *
 * onBytes: called with how many bytes of the file have been read. Throws FileFault.
 */
export async function* read(file, { signal, onBytes = () => {} } = {}) {
  const { kind, isPacked } = kindOf(file.name);
  const parser = { txt: plain, jsonl: objects, csv: table, tsv: table }[kind](file.name, kind === "tsv" ? "\t" : null);
  const decoder = new TextDecoder("utf-8", { fatal: true });
  let taken = 0;
  const counter = new TransformStream({
    transform(chunk, controller) {
      taken += chunk.byteLength;
      controller.enqueue(chunk);
    },
  });
  let stream = file.stream().pipeThrough(counter);
  if (isPacked) stream = stream.pipeThrough(new DecompressionStream("gzip"));
  const reader = stream.getReader();
  try {
    for (;;) {
      signal?.throwIfAborted();
      const { done, value } = await reader.read();
      let text;
      try {
        text = done ? decoder.decode() : decoder.decode(value, { stream: true });
      } catch {
        throw new FileFault(`${file.name}: this is not text in UTF-8. Save it as UTF-8 and drop it again.`);
      }
      onBytes(taken);
      yield* parser.take(text);
      if (done) break;
    }
    yield* parser.end();
  } catch (error) {
    if (isPacked && error instanceof TypeError) throw new FileFault(`${file.name}: this is not a whole gzip file`);
    throw error;
  } finally {
    reader.cancel().catch(() => {});
  }
}

function plain(name) {
  return byLines(name, (line, number) => ({ line: number, value: line }));
}

function objects(name) {
  return byLines(name, (line, number) => {
    try {
      const value = JSON.parse(line);
      const isUsable = typeof value === "string" || (value !== null && typeof value === "object" && !Array.isArray(value));
      return isUsable ? { line: number, source: line, value } : { line: number, source: line, value: null, fault: "this line is neither a string nor an object" };
    } catch {
      return { line: number, source: line, value: null, fault: "this line is not JSON" };
    }
  });
}

/** Lines that are not blank. */
function byLines(name, record) {
  let rest = "";
  let number = 0;
  function* whole(parts) {
    for (const part of parts) {
      number += 1;
      const line = part.endsWith("\r") ? part.slice(0, -1) : part;
      if (line.trim()) yield record(line, number);
    }
  }
  return {
    *take(text) {
      const parts = (rest + text).split("\n");
      rest = parts.pop();
      if (rest.length > MOST_CELL) throw new FileFault(`${name}, line ${number + 1}: a line of more than 8 MiB`);
      yield* whole(parts);
    },
    *end() {
      yield* whole(rest ? [rest] : []);
    },
  };
}

/** CSV as in RFC 4180; the first record has the names. delimiter: null finds `,`, `;` or a tab in them. */
function table(name, delimiter) {
  let head = "";
  let columns = null;
  let cells = [];
  let cell = "";
  let state = "start";
  let isQuoted = false;
  let line = 1;
  let first = 1;

  function* finish() {
    cells.push(cell);
    const row = cells;
    cells = [];
    cell = "";
    state = "start";
    const at = first;
    first = line;
    const isBlank = row.length === 1 && !row[0].trim() && !isQuoted;
    isQuoted = false;
    if (isBlank) return;
    if (columns === null) {
      columns = row.map((title, index) => title.trim() || `column ${index + 1}`);
      return;
    }
    const record = { line: at, columns, value: columns.map((_, index) => row[index] ?? "") };
    if (row.length !== columns.length) record.fault = `this row has ${row.length} cells, the first row has ${columns.length}`;
    yield record;
  }

  return {
    *take(text) {
      if (delimiter === null) {
        head += text;
        if (!head.includes("\n") && head.length < MOST_HEAD) return;
        text = head;
        delimiter = guessed(head);
      }
      for (const sign of text) {
        if (sign === "\n") line += 1;
        if (state === "quoted") {
          if (sign === '"') state = "quote";
          else cell += sign;
          if (cell.length > MOST_CELL) throw new FileFault(`${name}, line ${first}: a cell of more than 8 MiB, or a quote that is never closed`);
        } else if (sign === delimiter) {
          cells.push(cell);
          cell = "";
          state = "start";
        } else if (sign === "\n") {
          if (cell.endsWith("\r") && state === "plain") cell = cell.slice(0, -1);
          yield* finish();
        } else if (sign === '"' && state === "start") {
          state = "quoted";
          isQuoted = true;
        } else if (sign === '"' && state === "quote") {
          cell += '"';
          state = "quoted";
        } else if (sign === "\r" && state !== "plain") {
          // Before a line feed.
        } else {
          cell += sign;
          state = "plain";
        }
      }
    },
    *end() {
      if (delimiter === null) {
        delimiter = guessed(head);
        yield* this.take(head);
      }
      if (state === "quoted") throw new FileFault(`${name}, line ${first}: a quote that is never closed`);
      if (cells.length || cell || state !== "start") yield* finish();
      if (columns === null) throw new FileFault(`${name}: this file is empty`);
    },
  };
}

function guessed(text) {
  const line = text.split("\n", 1)[0];
  const counts = [",", ";", "\t"].map((sign) => [line.split(sign).length, sign]);
  return counts.reduce((best, item) => (item[0] > best[0] ? item : best))[1];
}

/** A field of a record as a string, or undefined. column: null for plain lines and lines of JSON that are strings. */
export function fieldOf(record, column) {
  const { value, columns } = record;
  if (typeof value === "string") return value;
  if (value === null) return undefined;
  const found = Array.isArray(value) ? value[columns.indexOf(column)] : value[column];
  return typeof found === "string" ? found : undefined;
}

/** One line of a CSV. */
export function csvLine(values) {
  return `${values.map(csvCell).join(",")}\n`;
}

function csvCell(value) {
  const text = value === null || value === undefined ? "" : String(value);
  return /[",\n\r]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
}

/**
 * A line of JSON lines with one more field; a line that is no object becomes its `text`. The object is
 * kept as it was written: parsed, numbers of more than 53 bits would be others.
 */
export function jsonLine({ value, source }, field, content) {
  const more = `"${field}":${JSON.stringify(content)}}\n`;
  if (value === null || typeof value !== "object") return `{"text":${JSON.stringify(value ?? source)},${more}`;
  if (Object.hasOwn(value, field)) return `${JSON.stringify({ ...value, [field]: content })}\n`;
  return `${source.slice(0, source.lastIndexOf("}"))}${Object.keys(value).length ? "," : ""}${more}`;
}

/** Collects the text of a large file without keeping all of it as strings. */
export class Output {
  #parts = [];
  #pending = [];
  #length = 0;

  constructor(type) {
    this.type = type;
  }

  write(text) {
    this.#pending.push(text);
    this.#length += text.length;
    if (this.#length > 2 ** 20) this.#flush();
  }

  blob() {
    this.#flush();
    return new Blob(this.#parts, { type: this.type });
  }

  #flush() {
    this.#parts.push(new Blob(this.#pending));
    this.#pending = [];
    this.#length = 0;
  }
}

/** Give a file to the person. */
export function download(blob, name) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60000);
}
