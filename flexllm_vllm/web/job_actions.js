// The buttons of a job: what its state allows.

import { download, request } from "./api.js";
import { confirm, toast, withButton } from "./dialogs.js";
import { h, setText } from "./dom.js";
import { act, canCancel, canPause, canResume, isRunning, jobName } from "./job_states.js";

export class JobActions {
  // `onChange` gets the job after an action.
  constructor(onChange) {
    this.onChange = onChange;
    this.job = null;
    this.asked = null; // { jobId, action, status }: what a running job has still to do
    this.pause = button("Pause", () => this.ask("pause"));
    this.resume = button("Resume", () => this.ask("resume"));
    this.cancel = button("Cancel job", () => this.confirmCancel());
    this.chat = h("a.button", {}, "Chat");
    this.save = button("Download", () => downloadAdapter(this.job.fine_tuned_model));
    this.results = button("Step metrics", () => this.downloadResults());
    this.cancel.classList.add("danger-text");
    const all = [this.pause, this.resume, this.chat, this.save, this.results, this.cancel];
    this.element = h("div.actions", {}, ...all);
  }

  update(job) {
    const { asked } = this;
    if (asked && (asked.jobId !== job.id || asked.status !== job.status)) this.asked = null;
    this.job = job;
    const action = this.asked?.action;
    this.pause.hidden = !canPause(job);
    this.pause.disabled = Boolean(action);
    setText(this.pause, action === "pause" ? "Pausing …" : "Pause");
    // A pause that has not happened yet can be taken back.
    this.resume.hidden = !canResume(job) && action !== "pause";
    this.cancel.hidden = !canCancel(job);
    this.cancel.disabled = action === "cancel";
    setText(this.cancel, action === "cancel" ? "Cancelling …" : "Cancel job");
    const model = job.fine_tuned_model;
    this.chat.hidden = !model;
    this.save.hidden = !model;
    if (model) this.chat.href = `#/chat/${encodeURIComponent(model)}`;
    this.results.hidden = !job.result_files?.length;
  }

  async ask(action) {
    const before = this.job;
    await withButton(this[action], async () => {
      const job = await act(before, action);
      const waits = isRunning(job) && action !== "resume";
      this.asked = waits ? { jobId: job.id, action, status: job.status } : null;
      this.onChange(job);
    });
    if (this.job) this.update(this.job);
  }

  async confirmCancel() {
    const text = "Its adapter so far is not kept, and it cannot be resumed.";
    if (await confirm(`Cancel “${jobName(this.job)}”?`, text, "Cancel job")) await this.ask("cancel");
  }

  async downloadResults() {
    const id = this.job.result_files[0];
    const path = `files/${encodeURIComponent(id)}/content`;
    await withButton(this.results, () => download(path, `${this.job.id}.csv`));
  }
}

export async function downloadAdapter(name) {
  const path = `finetuning/adapters/${encodeURIComponent(name)}/content`;
  try {
    await download(path, `${name.replaceAll(/[^\w.-]+/g, "_")}.tar.gz`);
  } catch (error) {
    toast(adapterProblem(error, "download"), "error");
  }
}

// Returns whether it is gone.
export async function deleteAdapter(name) {
  const text = `“${name}” is no longer served, and its files are removed.`;
  if (!(await confirm("Delete this model?", text, "Delete"))) return false;
  try {
    await request(`models/${encodeURIComponent(name)}`, { method: "DELETE" });
    return true;
  } catch (error) {
    toast(adapterProblem(error, "delete"), "error");
    return false;
  }
}

function adapterProblem(error, what) {
  const unknown = [404, 405].includes(error.status) && error.code !== "model_not_found";
  return unknown ? `This server does not offer to ${what} models.` : error.message;
}

function button(text, onclick) {
  return h("button", { type: "button", onclick }, text);
}
