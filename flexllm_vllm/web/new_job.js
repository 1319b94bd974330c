// A job from a dropped file: upload, then a short form. What is wrong is said by the server, and
// shown at the field that it names.

import { postJson, uploadFile } from "./api.js";
import { setText } from "./dom.js";
import { bytes, percent } from "./format.js";
import { fillSelect } from "./models.js";

// The last part of the server's `param` -> the field of the form.
const FIELDS = {
  file: "file",
  purpose: "file",
  training_file: "file",
  model: "model",
  suffix: "suffix",
  type: "method",
  method: "method",
  n_epochs: "n_epochs",
  learning_rate: "learning_rate",
  r: "r",
};

// A finger has nothing to drop.
const EMPTY = window.matchMedia("(pointer: coarse)").matches
  ? ["Choose a JSONL file", "one example a line"]
  : ["Drop a JSONL file here", "or choose one"];

export class NewJobDialog {
  constructor({ models, onCreated }) {
    this.models = models;
    this.onCreated = onCreated;
    this.dialog = document.getElementById("new-job-dialog");
    this.form = document.getElementById("new-job-form");
    this.zone = document.getElementById("drop-zone");
    this.input = document.getElementById("file-input");
    this.name = document.getElementById("file-name");
    this.state = document.getElementById("file-state");
    this.bar = document.getElementById("file-bar");
    this.submit = document.getElementById("new-job-submit");
    this.fileId = null;
    this.upload = null;
    this.form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.create();
    });
    this.input.addEventListener("change", () => {
      if (this.input.files.length) this.take(this.input.files[0]);
      this.input.value = "";
    });
    document.getElementById("new-job-close").addEventListener("click", () => this.dialog.close());
    this.dialog.addEventListener("close", () => this.upload?.abort());
    this.acceptDrops();
    this.reset();
  }

  updateModels() {
    fillSelect(this.form.elements.model, this.models.bases.map((card) => card.id));
  }

  open() {
    this.clearErrors();
    if (!this.dialog.open) this.dialog.showModal();
    this.update();
  }

  // A file that is on the server already.
  openWith({ id, filename, bytes: size }) {
    this.open();
    this.fileId = id;
    this.showFile(filename, `${bytes(size)}, on the server`);
    this.update();
  }

  // Files may be dropped anywhere on the page.
  acceptDrops() {
    const hasFiles = (event) => [...(event.dataTransfer?.types ?? [])].includes("Files");
    let depth = 0;
    const mark = (on) => document.body.classList.toggle("dropping", on);
    window.addEventListener("dragenter", (event) => {
      if (!hasFiles(event)) return;
      depth += 1;
      mark(true);
    });
    window.addEventListener("dragleave", (event) => {
      if (!hasFiles(event)) return;
      depth -= 1;
      if (depth <= 0) mark(false);
    });
    window.addEventListener("dragover", (event) => {
      if (hasFiles(event)) event.preventDefault();
    });
    window.addEventListener("drop", (event) => {
      if (!hasFiles(event)) return;
      event.preventDefault();
      depth = 0;
      mark(false);
      const [file] = event.dataTransfer.files;
      if (!file) return;
      this.open();
      this.take(file);
    });
  }

  async take(file) {
    this.upload?.abort();
    const upload = new AbortController();
    this.upload = upload;
    this.fileId = null;
    this.clearErrors();
    this.showFile(file.name, `${bytes(file.size)}, uploading`);
    this.progress(0);
    this.update();
    try {
      const stored = await uploadFile(file, (share) => this.progress(share, file), upload.signal);
      if (this.upload !== upload) return;
      this.fileId = stored.id;
      this.showFile(file.name, `${bytes(file.size)}, every line is checked`, "done");
      this.form.elements.suffix.focus();
    } catch (error) {
      if (this.upload !== upload) return;
      this.showFile(file.name, error.name === "AbortError" ? "not uploaded" : "refused", "failed");
      if (error.name !== "AbortError") this.showError(error, "file");
    }
    this.progress(null);
    this.upload = null;
    this.update();
  }

  progress(share, file) {
    this.bar.hidden = share === null;
    if (share === null) return;
    this.bar.value = share;
    if (!file) return;
    const text = share < 1 ? `${percent(share)} of ${bytes(file.size)}` : "checking every line";
    setText(this.state, text);
  }

  showFile(name, state, kind = "") {
    this.zone.dataset.state = kind || "chosen";
    setText(this.name, name);
    setText(this.state, state);
  }

  update() {
    this.submit.disabled = this.fileId === null || this.creating === true;
    setText(this.submit, this.creating ? "Starting …" : "Start job");
  }

  async create() {
    this.clearErrors();
    this.creating = true;
    this.update();
    try {
      const job = await postJson("fine_tuning/jobs", this.body());
      this.dialog.close();
      this.reset();
      this.onCreated(job);
    } catch (error) {
      this.showError(error, null);
    } finally {
      this.creating = false;
      this.update();
    }
  }

  body() {
    const value = (name) => this.form.elements[name].value.trim();
    const method = value("method");
    const hyperparameters = {};
    for (const name of ["n_epochs", "learning_rate"]) {
      if (value(name)) hyperparameters[name] = numberOrText(value(name));
    }
    const lora = value("r") ? { r: numberOrText(value("r")) } : {};
    return {
      model: value("model"),
      training_file: this.fileId,
      ...(value("suffix") ? { suffix: value("suffix") } : {}),
      method: { type: method, [method]: { hyperparameters, lora } },
    };
  }

  reset() {
    this.form.reset();
    this.fileId = null;
    this.zone.dataset.state = "";
    setText(this.name, EMPTY[0]);
    setText(this.state, EMPTY[1]);
  }

  showError(error, fallback) {
    const last = (error.param ?? "").split(".").at(-1);
    const name = FIELDS[last] ?? fallback;
    const place = document.getElementById(name ? `${name}-error` : "new-job-error");
    setText(place, error.message);
    place.hidden = false;
    const field = name === "file" ? this.input : this.form.elements[name];
    field?.setAttribute("aria-invalid", "true");
    if (name) field.focus();
  }

  clearErrors() {
    for (const place of this.form.querySelectorAll(".field-error, .alert")) {
      place.hidden = true;
      setText(place, "");
    }
    for (const field of this.form.querySelectorAll("[aria-invalid]")) {
      field.removeAttribute("aria-invalid");
    }
  }
}

// What is no number goes to the server as it is, which says what it expects.
function numberOrText(text) {
  const number = Number(text);
  return Number.isFinite(number) ? number : text;
}
