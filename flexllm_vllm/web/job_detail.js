// One job: figures, loss, events, checkpoints, settings.

import { emptyState, h, setText } from "./dom.js";
import { clock, count, dateTime, decimal, duration, NONE, percent } from "./format.js";
import { JobActions } from "./job_actions.js";
import { Checkpoints, EventList, Settings } from "./job_tabs.js";
import { isFinished, isRunning, jobName, statusChip, updateChip } from "./job_states.js";
import { LossChart } from "./loss_chart.js";
import { finishClock, finishText, progressBar, updateBar } from "./progress.js";
import { startHelp } from "./start.js";
import { Tabs } from "./tabs.js";

const TILES = ["Progress", "Speed", "Time left", "Training loss", "Validation"];

export class JobDetail {
  constructor({ log, onChange }) {
    this.log = log;
    this.job = null;
    this.settled = new Set(); // finished jobs whose events are all here
    this.actions = new JobActions((job) => {
      this.show(job);
      onChange(job);
    });
    this.title = h("h2", { tabindex: "-1" });
    this.chip = statusChip();
    this.id = h("p.mono.muted", {});
    this.model = h("p.mono.model-name", { hidden: true });
    this.error = h("div.alert", { role: "alert", hidden: true });
    this.bar = progressBar("Progress of the job");
    this.tiles = TILES.map(createTile);
    this.chart = new LossChart();
    this.chartNote = h("p.chart-note", {}, "");
    this.chart.element.append(this.chartNote);
    this.events = new EventList();
    this.checkpoints = new Checkpoints();
    this.settings = new Settings();
    this.tabs = new Tabs("Details of the job", [
      ["Events", this.events.element],
      ["Checkpoints", this.checkpoints.element],
      ["Settings", this.settings.element],
    ]);
    this.body = this.createBody();
    this.empty = emptyState(
      "No job selected",
      "The loss, the events and the checkpoints of a job show here.",
    );
    this.help = startHelp();
    this.element = h(
      "section.card.detail-card",
      { "aria-label": "Job" },
      this.empty,
      this.help,
      this.body,
    );
    this.show(null, "loading");
  }

  createBody() {
    const legend = h(
      "ul.legend",
      {},
      h("li", {}, h("i.swatch.train"), "Training, averaged"),
      h("li", {}, h("i.swatch.steps"), "each step"),
      h("li", {}, h("i.swatch.valid"), "Validation"),
    );
    return h(
      "div.detail",
      {},
      h("a.back", { href: "#/jobs" }, "‹ All jobs"),
      h(
        "div.detail-head",
        {},
        h("div", {}, h("div.title-row", {}, this.title, this.chip), this.id, this.model),
        this.actions.element,
      ),
      this.error,
      this.bar,
      h("dl.tiles.job-tiles", {}, ...this.tiles.map((tile) => tile.element)),
      h("div.chart-head", {}, h("h3", {}, "Loss"), legend),
      this.chart.element,
      this.tabs.element,
    );
  }

  // `job` null: there is none to show, `reason` says why: "loading", "none" (at all), "missing" (the
  // one that is named) or "unchosen".
  show(job, reason = "unchosen") {
    const other = job?.id !== this.job?.id;
    this.job = job;
    this.empty.hidden = job !== null || reason === "loading" || reason === "none";
    this.help.hidden = job !== null || reason !== "none";
    this.body.hidden = job === null;
    setText(this.empty.firstChild, reason === "missing" ? "No such job" : "No job selected");
    if (!job) return;
    if (other) this.checkpoints.reset();
    this.update();
  }

  async sync(signal) {
    const { job } = this;
    if (!job) return;
    const log = this.log(job.id);
    if (!this.settled.has(job.id)) {
      await log.sync(signal, true, () => this.update());
      if (isFinished(job)) this.settled.add(job.id);
    }
    await this.checkpoints.sync(job, signal, this.tabs.chosen === this.checkpoints.element);
    if (this.job?.id === job.id) this.update();
  }

  update() {
    const { job } = this;
    const log = this.log(job.id);
    const { progress, steps, evaluations } = log;
    setText(this.title, jobName(job));
    updateChip(this.chip, job);
    setText(this.id, `${job.id} · ${job.model} · created ${dateTime(job.created_at)}`);
    this.model.hidden = !job.fine_tuned_model;
    setText(this.model, job.fine_tuned_model ? `Served as ${job.fine_tuned_model}` : "");
    this.error.hidden = !job.error;
    setText(this.error, job.error ? job.error.message : "");
    this.actions.update(job);
    updateBar(this.bar, job, progress);
    this.updateTiles(job, progress, steps, evaluations);
    this.chart.update(steps, evaluations, progress?.total ?? 0);
    this.chartNote.hidden = steps.length > 0;
    setText(this.chartNote, chartNote(job, log));
    this.events.update(log.messages);
    this.settings.update(job);
  }

  updateTiles(job, progress, steps, evaluations) {
    const [done, speed, finish, loss, valid] = this.tiles;
    const share = progress ? percent(progress.done / progress.total) : NONE;
    setTile(done, share, progress ? `step ${count(progress.done)} of ${count(progress.total)}` : "");
    setTile(speed, count(progress?.tokensPerSecond), "tokens/s");
    if (isFinished(job)) {
      setText(finish.label, "Took");
      const seconds = (job.finished_at ?? job.created_at) - job.created_at;
      setTile(finish, duration(seconds), `ended ${clock(job.finished_at ?? job.created_at)}`);
    } else {
      setText(finish.label, "Time left");
      const left = finishText(job)?.replace(" left", "") ?? NONE;
      setTile(finish, left, isRunning(job) ? finishClock(job) : "");
    }
    const first = steps[0]?.train_loss;
    setTile(loss, decimal(steps.at(-1)?.train_loss), steps.length ? `began at ${decimal(first)}` : "");
    const last = evaluations.at(-1);
    const accuracy = last?.valid_mean_token_accuracy;
    const what = job.method?.type === "dpo" ? "pairs" : "tokens";
    const note = Number.isFinite(accuracy) ? `${percent(accuracy)} of ${what} right` : "";
    const none = job.validation_file ? "not evaluated yet" : "no validation file";
    setTile(valid, decimal(last?.valid_loss), last ? note : none);
  }
}

function chartNote(job, log) {
  if (!log.complete && !log.events.length) return "Loading …";
  if (isFinished(job)) return "The job ended before its first step.";
  if (job.status === "queued") return "The curve begins when the job has its turn.";
  return "The curve begins with the first step.";
}

function createTile(label) {
  const name = h("dt", {}, label);
  const value = h("dd.value", {}, NONE);
  const unit = h("dd.unit", {}, "");
  return { element: h("div.tile", {}, name, value, unit), label: name, value, unit };
}

function setTile(tile, value, unit) {
  setText(tile.value, value);
  setText(tile.unit, unit);
}
