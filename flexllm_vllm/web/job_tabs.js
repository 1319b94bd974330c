// What lies below the loss of a job: its events, checkpoints and settings.

import { getJson } from "./api.js";
import { emptyState, h, reconcile, setText } from "./dom.js";
import { clock, decimal } from "./format.js";

const SHOWN_EVENTS = 200;

export class EventList {
  constructor() {
    this.list = h("ol.events", {});
    this.element = h("div.tab-panel", {}, this.list);
  }

  // Newest first.
  update(events) {
    const shown = events.slice(-SHOWN_EVENTS).reverse();
    reconcile(this.list, shown, (event) => event.id, (event) =>
      h(
        "li",
        { "data-level": event.level },
        h("time", {}, clock(event.created_at, true)),
        h("span", {}, event.message),
      ),
    );
  }
}

export class Checkpoints {
  constructor() {
    this.body = h("tbody", {});
    this.table = h(
      "table",
      {},
      h(
        "thead",
        {},
        h("tr", {}, ...["Step", "Loss", "Validation", "Model"].map((t) => h("th", { scope: "col" }, t))),
      ),
      this.body,
    );
    this.empty = emptyState(
      "No checkpoints yet",
      "Each one is a model that can be asked while the job goes on.",
    );
    this.element = h("div.tab-panel", {}, this.empty, h("div.table-box", {}, this.table));
    this.reset();
  }

  reset() {
    this.status = null; // of the job when they were read
    this.offered = true;
    this.show([]);
  }

  async sync(job, signal, seen) {
    const stale = this.status !== job.status || (seen && job.status === "running");
    if (!this.offered || !stale) return;
    try {
      const path = `fine_tuning/jobs/${encodeURIComponent(job.id)}/checkpoints?limit=100`;
      const { data } = await getJson(path, { signal });
      this.status = job.status;
      this.show(data);
    } catch (error) {
      if (error.status !== 404 && error.status !== 405) throw error;
      this.offered = false; // a server without checkpoints
    }
  }

  show(checkpoints) {
    this.empty.hidden = checkpoints.length > 0;
    this.table.hidden = checkpoints.length === 0;
    reconcile(this.body, checkpoints, (checkpoint) => checkpoint.id, (checkpoint) => {
      const { metrics = {}, fine_tuned_model_checkpoint: name } = checkpoint;
      const loss = metrics.train_loss;
      const valid = metrics.full_valid_loss ?? metrics.valid_loss;
      return h(
        "tr",
        {},
        h("td", {}, String(checkpoint.step_number)),
        h("td", {}, decimal(loss)),
        h("td", {}, decimal(valid)),
        h("td.mono.long", {}, h("a", { href: `#/chat/${encodeURIComponent(name)}` }, name)),
      );
    });
  }
}

export class Settings {
  constructor() {
    this.list = h("dl.settings", {});
    this.element = h("div.tab-panel", {}, this.list);
  }

  update(job) {
    const method = job.method?.[job.method.type] ?? {};
    const values = [
      ["method", job.method?.type],
      ["training_file", job.training_file],
      ["validation_file", job.validation_file],
      ["seed", job.seed],
      ...Object.entries({ ...job.hyperparameters, ...method.hyperparameters }),
      ...Object.entries(method.lora ?? {}).map(([name, value]) => [`lora.${name}`, value]),
      ...Object.entries(job.metadata ?? {}).map(([name, value]) => [`metadata.${name}`, value]),
    ].filter(([, value]) => value !== null && value !== undefined);
    const create = ([name]) => h("div", {}, h("dt.mono", {}, name), h("dd.mono", {}));
    reconcile(this.list, values, ([name]) => name, create, (row, [, value]) => {
      setText(row.lastChild, textOf(value));
    });
  }
}

function textOf(value) {
  if (Array.isArray(value)) return value.map(textOf).join(", ");
  return typeof value === "object" ? JSON.stringify(value) : String(value);
}
