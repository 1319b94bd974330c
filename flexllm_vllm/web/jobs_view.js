// The first view: the engine, the list of jobs, and one of them.

import { getJson } from "./api.js";
import { h } from "./dom.js";
import { IterationsPanel } from "./iterations.js";
import { JobDetail } from "./job_detail.js";
import { JobList } from "./job_list.js";

const WIDE = window.matchMedia("(min-width: 900px)");

export class JobsView {
  constructor({ onNew, onChange }) {
    this.list = new JobList({ onNew });
    this.list.onMore = onChange;
    this.detail = new JobDetail({ log: (id) => this.list.log(id), onChange });
    this.detail.tabs.onChoose = onChange;
    this.engine = new IterationsPanel();
    this.element = h("div.jobs-view", {}, this.engine.element, this.list.element, this.detail.element);
    this.wanted = null;
    WIDE.addEventListener("change", () => this.choose());
  }

  // `jobId` null: the list; where there is room, with the job that is of most interest now.
  show(jobId) {
    this.wanted = jobId;
    this.element.classList.toggle("one-job", jobId !== null);
    this.choose();
    // On a phone the list, and with it what had the focus, is gone.
    if (jobId !== null && !WIDE.matches) this.detail.title.focus();
  }

  choose() {
    const { jobs, first } = this.list;
    const chosen = this.wanted ?? (WIDE.matches ? (this.detail.job ?? first)?.id : null) ?? null;
    this.list.select(chosen);
    const job = jobs.find((other) => other.id === chosen);
    if (job) this.detail.show(job);
    else if (!this.list.loaded) this.detail.show(null, "loading");
    else if (!chosen) this.detail.show(null, jobs.length ? "unchosen" : "none");
    else if (this.detail.job?.id !== chosen) this.detail.show(null, "loading");
  }

  async sync(signal) {
    const reads = [this.engine.sync(signal), this.syncJobs(signal)];
    const [engine, jobs] = await Promise.allSettled(reads);
    const failed = [jobs, engine].find((read) => read.status === "rejected");
    if (failed) throw failed.reason;
  }

  async syncJobs(signal) {
    await this.list.sync(signal);
    this.choose();
    if (this.wanted && !this.list.jobs.some((job) => job.id === this.wanted)) {
      await this.find(this.wanted, signal);
    }
    await this.detail.sync(signal);
  }

  // A job that is too old for the list.
  async find(jobId, signal) {
    try {
      this.detail.show(await getJson(`fine_tuning/jobs/${encodeURIComponent(jobId)}`, { signal }));
    } catch (error) {
      if (error.status !== 404) throw error;
      this.detail.show(null, "missing");
    }
  }
}
