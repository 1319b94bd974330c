// What a job is called, and what can be done with it in its state.

import { postJson } from "./api.js";
import { h, setText } from "./dom.js";

const LABELS = {
  validating_files: "Checking files",
  queued: "Queued",
  running: "Running",
  paused: "Paused",
  succeeded: "Succeeded",
  failed: "Failed",
  cancelled: "Cancelled",
};

export const isFinished = (job) => ["succeeded", "failed", "cancelled"].includes(job.status);
export const isRunning = (job) => job.status === "running";
export const canPause = (job) => ["validating_files", "queued", "running"].includes(job.status);
export const canResume = (job) => job.status === "paused";
export const canCancel = (job) => !isFinished(job);

export function jobName(job) {
  return job.user_provided_suffix || `Job ${job.id.slice(-6)}`;
}

export function statusChip() {
  return h("span.chip", {});
}

export function updateChip(chip, job) {
  chip.dataset.status = job.status;
  setText(chip, LABELS[job.status] ?? job.status);
}

// `action` is "cancel", "pause" or "resume"; returns the job as it is then.
export function act(job, action) {
  return postJson(`fine_tuning/jobs/${encodeURIComponent(job.id)}/${action}`);
}
