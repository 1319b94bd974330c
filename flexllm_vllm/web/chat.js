// The same question to two models, side by side.

import { ApiError } from "./api.js";
import { emptyState, h, setText } from "./dom.js";
import { count, decimal, milliseconds } from "./format.js";
import { fillSelect } from "./models.js";
import { streamChat } from "./sse.js";

const SIDES = ["left", "right"];

export class Chat {
  constructor(models) {
    this.models = models;
    this.histories = { left: [], right: [] };
    this.running = null;
    this.selects = {
      left: h("select", { "aria-label": "Model A" }),
      right: h("select", { "aria-label": "Model B" }),
    };
    this.turns = h("div.turns", { "aria-live": "off" });
    this.empty = emptyState(
      "Ask both models the same thing",
      "Choose a model on each side, the base and an adapter of it, and write below.",
    );
    this.input = h("textarea", {
      id: "chat-input",
      rows: 2,
      placeholder: "Write a message",
      "aria-label": "Message to both models",
    });
    this.maxTokens = numberField("Max tokens", "max-tokens", 256, 1, 1);
    this.temperature = numberField("Temperature", "temperature", 0, 0, 0.1);
    this.send = h("button.primary", { type: "submit" }, "Send");
    this.stop = h("button.danger", { type: "button", hidden: true }, "Stop");
    this.clear = h("button", { type: "button" }, "Clear");
    this.stop.addEventListener("click", () => this.running?.abort());
    this.clear.addEventListener("click", () => this.reset());
    this.input.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      this.ask();
    });
    for (const side of SIDES) this.selects[side].addEventListener("change", () => this.reset());
    this.element = this.build();
  }

  build() {
    const picker = (side, text) =>
      h(`div.picker.${side}`, {}, h("span", { "aria-hidden": "true" }, text), this.selects[side]);
    const form = h(
      "form.composer",
      {},
      this.input,
      h(
        "div.composer-row",
        {},
        this.maxTokens.element,
        this.temperature.element,
        h("div.actions.end", {}, this.clear, this.stop, this.send),
      ),
    );
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.ask();
    });
    return h(
      "section.card.chat",
      { "aria-label": "Chat" },
      h("div.pickers", {}, picker("left", "A"), picker("right", "B")),
      h("div.turns-box", {}, this.empty, this.turns),
      form,
    );
  }

  update() {
    const { bases, adapters, names } = this.models;
    fillSelect(this.selects.left, names, bases[0]?.id);
    fillSelect(this.selects.right, names, adapters[0]?.id);
    this.preferAdapter();
  }

  // The model that a link has named.
  show(name) {
    this.wanted = name;
    this.update();
  }

  preferAdapter() {
    const { wanted } = this;
    const select = this.selects.right;
    if (!wanted || !this.models.names.includes(wanted)) return;
    this.wanted = null;
    if (select.value === wanted) return;
    select.value = wanted;
    this.reset();
  }

  reset() {
    this.running?.abort();
    this.histories = { left: [], right: [] };
    this.turns.replaceChildren();
    this.empty.hidden = false;
  }

  async ask() {
    const text = this.input.value.trim();
    if (!text || this.running) return;
    this.input.value = "";
    this.empty.hidden = true;
    const running = new AbortController();
    this.running = running;
    this.busy(true);
    const answers = Object.fromEntries(SIDES.map((side) => [side, createAnswer(this.selects[side].value)]));
    this.turns.append(
      h(
        "div.turn",
        {},
        h("div.question", {}, text),
        h("div.answers", {}, ...SIDES.map((side) => answers[side].element)),
      ),
    );
    this.follow(true);
    await Promise.all(SIDES.map((side) => this.answer(side, text, answers[side], running.signal)));
    if (this.running === running) {
      this.running = null;
      this.busy(false);
      this.input.focus();
    }
  }

  async answer(side, text, answer, signal) {
    const history = this.histories[side];
    history.push({ role: "user", content: text });
    const began = performance.now();
    let first = null;
    let usage = null;
    let content = "";
    const onChunk = (chunk) => {
      if (chunk.error) throw new ApiError(500, chunk.error.message ?? "The server stopped.");
      usage = chunk.usage ?? usage;
      const piece = chunk.choices?.[0]?.delta?.content;
      if (!piece) return;
      first ??= performance.now();
      content += piece;
      answer.text.append(piece);
      this.follow(false);
    };
    try {
      await streamChat(this.body(side), onChunk, signal);
      setText(answer.note, noteOf(began, first, usage));
    } catch (error) {
      const stopped = error.name === "AbortError";
      setText(answer.note, stopped ? "Stopped" : error.message);
      answer.element.classList.toggle("failed", !stopped);
    }
    answer.element.classList.remove("writing");
    if (content) history.push({ role: "assistant", content });
    else history.pop(); // an answer that never came is no part of the talk
  }

  body(side) {
    return {
      model: this.selects[side].value,
      messages: [...this.histories[side]],
      max_tokens: this.maxTokens.value,
      temperature: this.temperature.value,
      stream: true,
      stream_options: { include_usage: true },
    };
  }

  busy(on) {
    this.send.hidden = on;
    this.stop.hidden = !on;
  }

  // Scrolls along, unless the reader has scrolled back.
  follow(always) {
    const box = this.turns.parentElement;
    const near = box.scrollHeight - box.scrollTop - box.clientHeight < 120;
    if (always || near) box.scrollTop = box.scrollHeight;
  }
}

function createAnswer(model) {
  const text = h("div.answer-text", {});
  const note = h("p.answer-note", { "aria-live": "polite" }, "");
  const element = h("article.answer.writing", {}, h("h3.mono", {}, model), text, note);
  return { element, text, note };
}

function noteOf(began, first, usage) {
  if (first === null) return "No text";
  const parts = [`first token after ${milliseconds(first - began)}`];
  const tokens = usage?.completion_tokens;
  const seconds = (performance.now() - first) / 1000;
  if (tokens) parts.unshift(`${count(tokens)} tokens`);
  if (tokens > 1 && seconds > 0) parts.push(`${decimal((tokens - 1) / seconds)} tokens/s`);
  return parts.join(" · ");
}

function numberField(label, id, value, min, step) {
  const input = h("input", { type: "number", id, value, min, step, inputmode: "decimal" });
  const element = h("label.inline", { for: id }, h("span", {}, label), input);
  return {
    element,
    get value() {
      return Number.isFinite(input.valueAsNumber) ? input.valueAsNumber : value;
    },
  };
}
