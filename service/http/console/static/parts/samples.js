// An hour of readings, finer the newer they are. Counters only grow, so a coarser level keeps some of
// the same readings and adds nothing up.

const LEVELS = [
  { step: 2, keep: 32 },
  { step: 10, keep: 32 },
  { step: 30, keep: 32 },
  { step: 60, keep: 62 },
];

/** What can be shown: the seconds of a window, and the level that it is drawn from. */
export const WINDOWS = [
  { seconds: 60, level: 0, name: "1 minute" },
  { seconds: 300, level: 1, name: "5 minutes" },
  { seconds: 900, level: 2, name: "15 minutes" },
  { seconds: 3600, level: 3, name: "1 hour" },
];

export class Samples {
  #levels = LEVELS.map(() => []);
  #last = null;

  /** Keep a reading: anything with `at`, in seconds on a clock that only goes forward. */
  add(reading) {
    this.#last = reading;
    for (const [index, { step, keep }] of LEVELS.entries()) {
      const level = this.#levels[index];
      // Timers are late by a little, never early by much.
      if (level.length === 0 || reading.at - level.at(-1).at >= step - 0.5) level.push(reading);
      if (level.length > keep) level.shift();
    }
  }

  /** The newest reading, or null. */
  get last() {
    return this.#last;
  }

  /**
   * The readings of a window, the oldest first; the newest reading is the last. While all readings
   * are on a finer level than the window's, they are taken from there.
   */
  within({ seconds, level: coarsest }) {
    const first = this.#levels.at(-1)[0];
    const finer = this.#levels.findIndex((readings) => readings[0] === first);
    const level = Math.min(coarsest, finer);
    const { step } = LEVELS[level];
    const since = (this.#last?.at ?? 0) - seconds - step / 2;
    const found = this.#levels[level].filter(({ at }) => at >= since);
    if (this.#last && found.at(-1) !== this.#last && this.#last.at - (found.at(-1)?.at ?? 0) >= Math.min(step / 3, 2)) found.push(this.#last);
    return found;
  }

  /** Forget everything: another service, or another key, is asked from now on. */
  clear() {
    this.#levels = LEVELS.map(() => []);
    this.#last = null;
  }
}
