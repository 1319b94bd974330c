// The page: which view is seen, and the reading that keeps it true.

import { Chat } from "./chat.js";
import { Connection } from "./connection.js";
import { toast } from "./dialogs.js";
import { setAttribute, setText } from "./dom.js";
import { forgetKey, currentKey } from "./key.js";
import { jobName } from "./job_states.js";
import { JobsView } from "./jobs_view.js";
import { Library } from "./library.js";
import { Models } from "./models.js";
import { NewJobDialog } from "./new_job.js";
import { Poller } from "./poll.js";

const models = new Models();
const connection = new Connection(() => poller.now());
const newJob = new NewJobDialog({
  models,
  onCreated: (job) => {
    toast(`“${jobName(job)}” is queued.`);
    location.hash = `#/jobs/${encodeURIComponent(job.id)}`;
    poller.now();
  },
});
const views = {
  jobs: new JobsView({ onNew: () => newJob.open(), onChange: () => poller.now() }),
  chat: new Chat(models),
  library: new Library({
    models,
    onTrain: (file) => newJob.openWith(file),
    onChange: () => poller.now(),
  }),
};
const main = document.getElementById("main");
main.replaceChildren(...Object.values(views).map((view) => view.element));
let shown = null;

const poller = new Poller(read, (state, detail) => connection.show(state, detail));

async function read(signal) {
  await models.sync(signal);
  setText(document.getElementById("served-model"), models.bases[0]?.id ?? "");
  setText(document.getElementById("key-button"), currentKey() ? "Forget key" : "");
  document.getElementById("key-button").hidden = !currentKey();
  newJob.updateModels();
  views.chat.update();
  await views[shown].sync?.(signal);
}

// "#/jobs", "#/jobs/<id>", "#/chat/<model>", "#/library"
function route() {
  const [name, argument] = location.hash.replace(/^#\/?/, "").split("/");
  const view = name in views ? name : "jobs";
  const value = argument ? decodeURIComponent(argument) : null;
  for (const [other, { element }] of Object.entries(views)) element.hidden = other !== view;
  for (const link of document.querySelectorAll("nav a")) {
    const here = link.getAttribute("href") === `#/${view}`;
    setAttribute(link, "aria-current", here ? "page" : null);
  }
  const changed = shown !== view;
  shown = view;
  views[view].show?.(value);
  if (changed || value) window.scrollTo(0, 0);
  poller.now();
}

document.getElementById("key-button").addEventListener("click", () => {
  forgetKey();
  location.reload();
});
window.addEventListener("hashchange", route);
route();
