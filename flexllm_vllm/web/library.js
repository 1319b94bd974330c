// Files and models that are on the server.

import { download, getJson, request } from "./api.js";
import { confirm, toast, withButton } from "./dialogs.js";
import { emptyState, h, reconcile, setText } from "./dom.js";
import { ago, bytes } from "./format.js";
import { deleteAdapter, downloadAdapter } from "./job_actions.js";

export class Library {
  constructor({ models, onTrain, onChange }) {
    this.models = models;
    this.onTrain = onTrain;
    this.onChange = onChange;
    this.modelRows = h("tbody", {});
    this.fileRows = h("tbody", {});
    this.noModels = emptyState(
      "No finetuned models yet",
      "A job that succeeds serves its adapter here under a name of its own.",
    );
    this.noFiles = emptyState(
      "No files yet",
      "Drop a JSONL file anywhere on this page: it is uploaded, checked and ready for a job.",
    );
    this.modelTable = table(["Model", "Created", ""], this.modelRows);
    this.fileTable = table(["File", "Size", "Uploaded", ""], this.fileRows);
    this.element = h(
      "div.library",
      {},
      section("models-title", "Finetuned models", this.noModels, this.modelTable),
      section("files-title", "Files", this.noFiles, this.fileTable),
    );
    for (const hidden of [this.noModels, this.noFiles]) hidden.hidden = true;
  }

  async sync(signal) {
    const { data } = await getJson("files?limit=100", { signal });
    this.updateModels();
    this.noFiles.hidden = data.length > 0;
    this.fileTable.hidden = data.length === 0;
    reconcile(this.fileRows, data, (file) => file.id, (file) => this.fileRow(file), updateAge);
  }

  updateModels() {
    const { adapters, loaded } = this.models;
    this.noModels.hidden = !loaded || adapters.length > 0;
    this.modelTable.hidden = adapters.length === 0;
    reconcile(this.modelRows, adapters, (card) => card.id, (card) => this.modelRow(card), (row, card) =>
      updateAge(row, { created_at: card.created }),
    );
  }

  modelRow({ id, parent }) {
    const chat = h("a.button", { href: `#/chat/${encodeURIComponent(id)}` }, "Chat");
    const save = button("Download", (self) => withButton(self, () => downloadAdapter(id)));
    const remove = button("Delete", async () => {
      if (await deleteAdapter(id)) this.gone(`“${id}” is deleted.`);
    });
    remove.classList.add("danger-text");
    const name = h("td.long", {}, h("span.mono", {}, id), h("small", {}, `on ${parent}`));
    return h("tr", {}, name, h("td.meta.age", {}), actions(chat, save, remove));
  }

  fileRow(file) {
    const { id, filename } = file;
    const path = `files/${encodeURIComponent(id)}`;
    const buttons = [];
    if (file.purpose === "fine-tune") buttons.push(button("New job", () => this.onTrain(file)));
    buttons.push(
      button("Download", (self) => withButton(self, () => download(`${path}/content`, filename))),
    );
    const remove = button("Delete", (self) => this.removeFile(self, file, path));
    remove.classList.add("danger-text");
    const name = h("td.long", {}, h("span", {}, filename), h("small.mono", {}, id));
    const size = h("td.meta", {}, bytes(file.bytes));
    return h("tr", {}, name, size, h("td.meta.age", {}), actions(...buttons, remove));
  }

  async removeFile(self, file, path) {
    const text = "Jobs that are done keep their results.";
    if (!(await confirm(`Delete “${file.filename}”?`, text, "Delete"))) return;
    await withButton(self, async () => {
      await request(path, { method: "DELETE" });
      this.gone(`“${file.filename}” is deleted.`);
    });
  }

  gone(text) {
    toast(text);
    this.onChange();
  }
}

function updateAge(row, { created_at: time }) {
  setText(row.querySelector(".age"), ago(time));
}

function section(id, title, ...children) {
  return h("section.card", { "aria-labelledby": id }, h("h2", { id }, title), ...children);
}

function table(titles, rows) {
  const heads = titles.map((title) => (title ? h("th", { scope: "col" }, title) : h("td", {})));
  return h("div.table-box", {}, h("table.library-table", {}, h("thead", {}, h("tr", {}, ...heads)), rows));
}

function actions(...buttons) {
  return h("td.row-actions", {}, h("div.actions.end", {}, ...buttons));
}

function button(text, onclick) {
  const self = h("button", { type: "button", onclick: () => onclick(self) }, text);
  return self;
}
