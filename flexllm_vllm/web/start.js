// What the place of a job shows while there is none: how to come to the first one.

import { h } from "./dom.js";

const EXAMPLES = [
  '{"messages": [{"role": "user", "content": "2+3?"}, {"role": "assistant", "content": "5"}]}',
  '{"prompt": "2+3?", "completion": " 5"}',
].join("\n");

export function startHelp() {
  const step = (title, text, ...more) =>
    h("li", {}, h("div", {}, h("h3", {}, title), h("p", {}, text), ...more));
  return h(
    "div.start",
    {},
    h("h2", {}, "Train your first adapter"),
    h(
      "ol",
      {},
      step(
        "Write examples",
        "A JSONL file, one example a line, in one of two forms:",
        h("pre.mono", { tabindex: "0", "aria-label": "Two examples" }, EXAMPLES),
      ),
      step(
        "Start a job",
        "Drop the file on this page, give the adapter a name, and start. The job trains in the " +
          "room that requests leave free, within their latency target.",
      ),
      step(
        "Use it",
        "When the job has succeeded its adapter is a model of this server: ask it beside the base " +
          "model under Chat, or name it as “model” in any OpenAI client.",
      ),
    ),
  );
}
