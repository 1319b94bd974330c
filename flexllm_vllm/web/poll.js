// Repeats reads of the server: only while the page is seen, and ever more seldom while the server
// is away.

const INTERVAL = 1500;
const LONGEST_WAIT = 30_000;
const TIMEOUT = 20_000;

export class Poller {
  // `read` gets an AbortSignal; `onState` gets "live", "away" (with the time of the next try) or
  // "error" (with a message: the server answers, but not with what was asked).
  constructor(read, onState) {
    this.read = read;
    this.onState = onState;
    this.failures = 0;
    this.timer = null;
    this.running = null;
    window.addEventListener("key", () => this.now());
    document.addEventListener("visibilitychange", () => this.now());
    window.addEventListener("online", () => this.now());
  }

  // Reads at once; a read under way is replaced, since what is looked at may have changed.
  now() {
    clearTimeout(this.timer);
    this.running?.abort();
    this.running = null;
    if (document.visibilityState === "visible") this.run();
  }

  async run() {
    const running = new AbortController();
    this.running = running;
    let wait = INTERVAL;
    try {
      await this.read(AbortSignal.any([running.signal, AbortSignal.timeout(TIMEOUT)]));
      if (running.signal.aborted) return;
      this.failures = 0;
      this.onState("live");
    } catch (error) {
      if (running.signal.aborted) return;
      wait = Math.min(LONGEST_WAIT, INTERVAL * 2 ** this.failures);
      this.failures += 1;
      if (error.away) this.onState("away", Date.now() + wait);
      else this.onState("error", error.message);
    }
    this.timer = setTimeout(() => this.now(), wait);
  }
}
