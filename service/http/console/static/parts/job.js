// Many texts through POST /v1/predict/stream, a portion at a time: a browser sends all of a body before
// it reads the answer, so a portion is small enough for that.

import * as api from "../api.js";
import { untilBack } from "../shell.js";

const PORTION_LINES = 128;
const PORTION_CHARACTERS = 64 * 1024;
const PORTIONS_IN_FLIGHT = 2;
// Tries of one portion that brought nothing; each waits until the service is ready.
const TRIES = 20;

/**
 * Answer items in their order.
 *
 * items: an iterable or async iterable. linesOf: the lines of the stream for an item, possibly none.
 * Yields `{item, answers}`, an answer for each line: a result, or `{error}`. onWait: called with a
 * sentence when the service has to be waited for, and with null when it goes on.
 */
export async function* job(items, linesOf, { signal, onWait = () => {} } = {}) {
  const running = [];
  try {
    for await (const portion of portions(items, linesOf)) {
      const answering = answered(portion, signal, onWait);
      // Looked at when its turn comes; until then it is no unhandled rejection.
      answering.catch(() => {});
      running.push(answering);
      if (running.length === PORTIONS_IN_FLIGHT) yield* await running.shift();
    }
    while (running.length) yield* await running.shift();
  } finally {
    await Promise.allSettled(running);
  }
}

async function* portions(items, linesOf) {
  let portion = [];
  let lines = 0;
  let characters = 0;
  for await (const item of items) {
    const own = linesOf(item);
    portion.push({ item, lines: own });
    lines += own.length;
    for (const line of own) characters += line.text.length + (line.text_pair?.length ?? 0);
    // Items without lines count, too, so that a file of faults is not collected as a whole.
    if (Math.max(lines, portion.length) >= PORTION_LINES || characters >= PORTION_CHARACTERS) {
      yield portion;
      portion = [];
      lines = characters = 0;
    }
  }
  if (portion.length) yield portion;
}

async function answered(portion, signal, onWait) {
  const lines = portion.flatMap((entry) => entry.lines);
  const answers = [];
  for (let tries = 0; answers.length < lines.length; tries += 1) {
    const before = answers.length;
    try {
      for await (const answer of api.lines("v1/predict/stream", lines.slice(before), { signal })) {
        // The stream itself has ended; what it has not answered is sent again.
        if (answer.error && answer.line === null) break;
        answers.push(answer);
      }
      onWait(null);
    } catch (error) {
      const isPassing = error instanceof api.Unreachable || [429, 503, 504].includes(error.status);
      if (!isPassing || tries >= TRIES) throw error;
      onWait(error.message);
      await pause(1000 * (error.retryAfter ?? 1), signal);
      await untilBack(signal);
    }
    if (answers.length > before) tries = 0;
    else if (tries >= TRIES) throw new Error("The service took these lines and answered none of them, again and again.");
  }
  let at = 0;
  return portion.map(({ item, lines: own }) => ({ item, answers: answers.slice(at, (at += own.length)) }));
}

function pause(milliseconds, signal) {
  return new Promise((resolve, reject) => {
    const timer = setTimeout(resolve, milliseconds);
    signal?.addEventListener("abort", () => {
      clearTimeout(timer);
      reject(signal.reason);
    }, { once: true });
  });
}
