// The events of a job, oldest first, fetched once each.

import { getJson } from "./api.js";

const NEWEST = 50;
const OLDER = 100;

export class EventLog {
  constructor(jobId) {
    this.jobId = jobId;
    this.events = [];
    this.ids = new Set();
    this.complete = false;
    this.oldestId = null;
  }

  // What is new. With `all`, what is older too, a page for each call of `onPage`.
  async sync(signal, all = false, onPage = () => {}) {
    await this.fetchNewer(signal);
    while (all && !this.complete) {
      onPage();
      await this.fetchOlder(signal);
    }
  }

  async fetchNewer(signal) {
    let page = await this.page(NEWEST, null, signal);
    const first = this.events.length === 0;
    let found = [];
    for (;;) {
      const unknown = page.data.filter((event) => !this.ids.has(event.id));
      found = [...unknown.reverse(), ...found];
      const overlaps = unknown.length < page.data.length;
      if (first || overlaps || !page.has_more) break;
      page = await this.page(OLDER, page.last_id, signal);
    }
    if (first && page.data.length) {
      this.oldestId = page.last_id;
      this.complete = !page.has_more;
    }
    this.add(found, false);
  }

  async fetchOlder(signal) {
    if (this.oldestId === null) {
      this.complete = true;
      return;
    }
    const page = await this.page(OLDER, this.oldestId, signal);
    this.add([...page.data].reverse(), true);
    this.oldestId = page.last_id ?? this.oldestId;
    this.complete = !page.has_more;
  }

  page(limit, after, signal) {
    const cursor = after ? `&after=${encodeURIComponent(after)}` : "";
    const job = encodeURIComponent(this.jobId);
    return getJson(`fine_tuning/jobs/${job}/events?limit=${limit}${cursor}`, { signal });
  }

  add(events, inFront) {
    for (const event of events) this.ids.add(event.id);
    this.events = inFront ? [...events, ...this.events] : [...this.events, ...events];
  }

  get messages() {
    return this.events.filter((event) => event.type !== "metrics");
  }

  // { step, total_steps, train_loss, ... } of each optimizer step that is known.
  get steps() {
    return this.metrics("train_loss");
  }

  get evaluations() {
    return this.metrics("valid_loss");
  }

  // A step once, in order.
  metrics(name) {
    const found = new Map();
    for (const { type, data } of this.events) {
      if (type === "metrics" && Number.isFinite(data?.[name]) && !found.has(data.step)) {
        found.set(data.step, data);
      }
    }
    return [...found.values()].sort((a, b) => a.step - b.step);
  }

  // { done, total, tokensPerSecond } at the furthest step, or null before the first.
  get progress() {
    const steps = this.steps;
    if (!steps.length) return null;
    const last = steps[steps.length - 1];
    const recent = steps.slice(-8).filter((step) => step.tokens_per_second > 0);
    const tokens = recent.reduce((sum, step) => sum + step.tokens, 0);
    const seconds = recent.reduce((sum, step) => sum + step.tokens / step.tokens_per_second, 0);
    return {
      done: last.step,
      total: last.total_steps,
      tokensPerSecond: seconds > 0 ? tokens / seconds : NaN,
    };
  }
}
