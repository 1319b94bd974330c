// How far a job is: a bar, and a line of figures.

import { h, setAttribute } from "./dom.js";
import { ago, clock, count, duration, remaining } from "./format.js";
import { isFinished, isRunning } from "./job_states.js";

export function progressBar(label) {
  const attributes = { role: "progressbar", "aria-valuemin": 0, "aria-valuemax": 100 };
  return h("div.progress", { ...attributes, "aria-label": label }, h("div.progress-fill"));
}

export function updateBar(bar, job, progress) {
  const share = job.status === "succeeded" ? 1 : progress ? progress.done / progress.total : 0;
  setAttribute(bar, "aria-valuenow", Math.round(share * 100));
  bar.dataset.status = job.status;
  // It grows with its job, but does not run from one job's length to another's.
  bar.classList.toggle("other", bar.dataset.job !== job.id);
  bar.dataset.job = job.id;
  bar.firstChild.style.transform = `scaleX(${Math.min(1, share)})`;
}

export function finishText(job, now = Date.now() / 1000) {
  if (!isRunning(job) || !job.estimated_finish) return null;
  return `${remaining(job.estimated_finish - now)} left`;
}

export function finishClock(job) {
  return job.estimated_finish ? `about ${clock(job.estimated_finish)}` : "after the first step";
}

// One line for the list.
export function summary(job, progress) {
  const parts = [];
  if (progress && !isFinished(job)) parts.push(`${count(progress.done)} / ${count(progress.total)}`);
  if (isRunning(job)) {
    if (progress?.tokensPerSecond > 0) parts.push(`${count(progress.tokensPerSecond)} tok/s`);
    parts.push(finishText(job) ?? (progress ? "" : "starting"));
  } else if (job.status === "queued") {
    parts.push("waits for its turn");
  } else if (job.status === "paused") {
    parts.push(progress ? "stopped for now" : "not begun");
  } else if (isFinished(job)) {
    parts.push(ago(job.finished_at ?? job.created_at));
    if (job.trained_tokens) parts.push(`${count(job.trained_tokens)} tokens`);
    const seconds = job.finished_at - job.created_at;
    if (job.status === "succeeded") parts.push(`took ${duration(seconds)}`);
  }
  return parts.filter(Boolean).join(" · ");
}
