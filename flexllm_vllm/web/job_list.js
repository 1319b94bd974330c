// The jobs, newest first.

import { getJson } from "./api.js";
import { emptyState, h, reconcile, setAttribute, setText } from "./dom.js";
import { EventLog } from "./events.js";
import { isFinished, jobName, statusChip, updateChip } from "./job_states.js";
import { progressBar, summary, updateBar } from "./progress.js";

const PAGE = 30;

export class JobList {
  constructor({ onNew }) {
    this.jobs = [];
    this.logs = new Map();
    this.shown = PAGE;
    this.loaded = false;
    this.list = h("ul.job-list", {});
    this.more = h("button.wide", { type: "button", hidden: true }, "Show older jobs");
    this.more.addEventListener("click", () => {
      this.shown += PAGE;
      this.onMore();
    });
    this.empty = emptyState(
      "No jobs yet",
      "Drop a JSONL file anywhere on this page, or choose one. Each line is one example: " +
        "a chat with “messages”, or a “prompt” and its “completion”.",
      h("button.primary", { type: "button", onclick: onNew }, "Choose a file"),
    );
    this.empty.hidden = true;
    this.element = h(
      "section.card.list-card",
      { "aria-labelledby": "jobs-title" },
      h(
        "div.card-head",
        {},
        h("h2", { id: "jobs-title" }, "Jobs"),
        h("button.primary", { type: "button", id: "new-job", onclick: onNew }, "New job"),
      ),
      this.list,
      this.empty,
      this.more,
    );
    this.onMore = () => {};
  }

  log(jobId) {
    if (!this.logs.has(jobId)) this.logs.set(jobId, new EventLog(jobId));
    return this.logs.get(jobId);
  }

  // Reads the jobs, and the newest events of those that go on.
  async sync(signal) {
    let jobs = [];
    let page = { has_more: true };
    while (page.has_more && jobs.length < this.shown) {
      const after = page.last_id ? `&after=${encodeURIComponent(page.last_id)}` : "";
      page = await getJson(`fine_tuning/jobs?limit=${PAGE}${after}`, { signal });
      jobs = [...jobs, ...page.data];
    }
    this.jobs = jobs;
    this.more.hidden = !page.has_more;
    this.loaded = true;
    this.update();
    for (const job of jobs) {
      const known = this.log(job.id).progress !== null;
      const moving = job.status === "running" || (job.status === "paused" && !known);
      if (moving) await this.log(job.id).fetchNewer(signal);
    }
    this.update();
  }

  // The job to show where none is named: one that runs, or the newest.
  get first() {
    return this.jobs.find((job) => job.status === "running") ?? this.jobs[0] ?? null;
  }

  select(jobId) {
    this.selected = jobId;
    this.update();
  }

  update() {
    this.empty.hidden = !this.loaded || this.jobs.length > 0;
    this.list.hidden = this.jobs.length === 0;
    reconcile(this.list, this.jobs, (job) => job.id, createEntry, (entry, job) => {
      this.updateEntry(entry, job);
    });
  }

  updateEntry(entry, job) {
    const { link, name, chip, bar, line } = entry.parts;
    const progress = this.log(job.id).progress;
    setText(name, jobName(job));
    setAttribute(name, "title", jobName(job));
    updateChip(chip, job);
    setText(line, summary(job, progress));
    updateBar(bar, job, progress);
    bar.classList.toggle("off", isFinished(job) || !progress);
    setAttribute(link, "aria-current", job.id === this.selected ? "true" : null);
  }
}

function createEntry(job) {
  const name = h("span.job-name", {});
  const chip = statusChip();
  const line = h("span.job-line", {});
  const bar = progressBar("Progress");
  const link = h(
    "a.job",
    { href: `#/jobs/${encodeURIComponent(job.id)}` },
    h("span.job-top", {}, name, chip),
    bar,
    line,
  );
  const entry = h("li", {}, link);
  entry.parts = { link, name, chip, bar, line };
  return entry;
}
