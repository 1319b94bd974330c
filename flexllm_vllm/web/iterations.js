// How the last iterations were shared between inference and finetuning, and the latency target.

import { getJson } from "./api.js";
import { barPath, Chart, drawAxis, linear, ticks } from "./chart.js";
import { h, setAttribute, setText } from "./dom.js";
import { count, milliseconds, NONE, percent } from "./format.js";

const LAST = 240;
const MARGIN = { left: 52, right: 6, top: 8, bottom: 6 };
const GAP = 14;
const RATE_SECONDS = 30;
const IDLE_SECONDS = 5;

const inference = (i) => i.decode_tokens + i.prefill_tokens;
const finetuning = (i) =>
  i.finetuning_forward_tokens + i.finetuning_backward_tokens + i.finetuning_loss_tokens;

export class IterationsPanel {
  constructor() {
    this.iterations = [];
    this.tiles = {
      attained: tile("Within the target", "of iterations with requests"),
      time: tile("Iteration with requests", "median"),
      inference: tile("Inference", "tokens/s", "inference"),
      finetuning: tile("Finetuning", "tokens/s forward", "finetuning"),
    };
    const label = "Iterations: duration against the target, and what they held";
    this.shown = { rows: [], left: 0, slot: 1 };
    this.chart = new Chart("iterations-chart", label, {
      draw: (width, height) => this.draw(width, height),
      count: () => this.shown.rows.length,
      nearest: (x) => Math.floor((x - this.shown.left) / this.shown.slot),
      read: (index) => this.read(index),
    });
    this.note = h("p.chart-note", {}, "Waiting for the engine’s first iterations");
    this.box = this.chart.box;
    this.box.classList.add("iterations-box");
    this.box.append(this.note);
    const tiles = Object.values(this.tiles).map((t) => t.element);
    this.element = h(
      "section.card.engine",
      { "aria-labelledby": "engine-title" },
      h(
        "div.engine-side",
        {},
        h("h2", { id: "engine-title" }, "Engine now"),
        h("dl.tiles", {}, ...tiles),
      ),
      h("div.engine-main", {}, legend(), this.box),
    );
  }

  async sync(signal) {
    const { data } = await getJson(`finetuning/iterations?last=${LAST}`, { signal });
    this.iterations = data;
    this.watchIdle();
    this.updateTiles();
    this.note.hidden = data.length > 0;
    this.chart.update();
  }

  // By our own clock, which may differ from the server's: has anything begun since we last looked?
  watchIdle() {
    const newest = this.iterations.at(-1)?.start_time;
    if (newest !== this.newest) {
      const first = this.newest === undefined;
      this.newest = newest;
      const longAgo = first && Date.now() / 1000 - newest > 60;
      this.changed = longAgo ? -Infinity : performance.now() / 1000;
    }
    this.idle = performance.now() / 1000 - this.changed > IDLE_SECONDS;
  }

  updateTiles() {
    const { iterations, tiles } = this;
    const served = iterations.filter((i) => inference(i) > 0);
    const bound = served.filter((i) => i.target_ms !== null);
    const kept = bound.filter((i) => i.duration_ms <= i.target_ms).length;
    setText(tiles.attained.value, bound.length ? percent(kept / bound.length) : NONE);
    setText(tiles.time.value, milliseconds(median(served.map((i) => i.duration_ms))));
    const target = bound.at(-1)?.target_ms;
    setText(tiles.time.unit, target ? `median, target ${milliseconds(target)}` : "median");
    const recent = lastSeconds(iterations, RATE_SECONDS);
    const seconds = span(recent);
    const rate = (tokens) => {
      if (this.idle) return 0;
      return seconds > 0 ? recent.reduce((sum, i) => sum + tokens(i), 0) / seconds : NaN;
    };
    setText(tiles.inference.value, count(rate(inference)));
    setText(tiles.finetuning.value, count(rate((i) => i.finetuning_forward_tokens)));
    setAttribute(
      this.chart.element,
      "aria-label",
      `The last ${iterations.length} iterations: ${tiles.attained.value.textContent} of those ` +
        `with requests within the target, ${tiles.inference.value.textContent} inference and ` +
        `${tiles.finetuning.value.textContent} finetuning tokens per second`,
    );
  }

  // Above: the time of each iteration and its target. Below: its tokens, forward up, backward down.
  draw(width, height) {
    const { chart } = this;
    const shown = Math.max(40, Math.min(LAST, Math.floor((width - MARGIN.left) / 3)));
    const rows = this.iterations.slice(-shown);
    const slot = (width - MARGIN.left - MARGIN.right) / shown;
    const left = width - MARGIN.right - rows.length * slot;
    const bar = Math.max(1, slot - (slot > 4 ? 1 : 0.4));
    this.shown = { rows, left, slot };
    const split = MARGIN.top + (height - MARGIN.top - MARGIN.bottom - GAP) * 0.46;
    const frame = { x: MARGIN.left, x2: width - MARGIN.right, anchor: "end" };
    this.drawTimes({ rows, left, slot, bar, frame, top: MARGIN.top, bottom: split });
    this.drawTokens({ rows, left, slot, bar, frame, top: split + GAP, bottom: height - MARGIN.bottom });
    chart.part("line", "cursor");
  }

  drawTimes({ rows, left, slot, bar, frame, top, bottom }) {
    const { chart } = this;
    const targets = rows.map((i) => i.target_ms ?? 0);
    const slow = quantile(rows.map((i) => i.duration_ms), 0.99) || 0;
    const longest = Math.max(1, slow, ...targets.map((target) => target * 1.3));
    const y = linear(0, longest, bottom, top);
    const times = rows.length ? ticks(0, longest, 3) : [];
    const marks = times.map((value) => ({ at: y(value), text: milliseconds(value) }));
    drawAxis(chart.part("g", "grid"), marks, frame);
    const column = (wanted, from, to) =>
      barPath(
        rows.map((i, n) => {
          const [low, high] = wanted(i) ? [from(i), Math.min(to(i), longest)] : [0, 0];
          return { x: left + n * slot, y: y(high), width: bar, height: y(low) - y(high) };
        }),
      );
    const zero = () => 0;
    const within = (i) => Math.min(i.duration_ms, i.target_ms ?? Infinity);
    const parts = {
      "time-inference": column((i) => finetuning(i) === 0, zero, within),
      "time-mixed": column((i) => inference(i) > 0 && finetuning(i) > 0, zero, within),
      "time-finetuning": column((i) => inference(i) === 0 && finetuning(i) > 0, zero, within),
      "time-over": column((i) => i.duration_ms > (i.target_ms ?? Infinity), within, (i) => i.duration_ms),
    };
    for (const [name, path] of Object.entries(parts)) chart.part("path", name).setAttribute("d", path);
    chart.part("path", "target").setAttribute("d", targetPath(rows, left, slot, y));
  }

  drawTokens({ rows, left, slot, bar, frame, top, bottom }) {
    const { chart } = this;
    // A long prompt now and then must not make the rest invisible: its bar is cut off.
    const highest = (tokens) => 1.1 * quantile(rows.map(tokens).filter((n) => n > 0), 0.95);
    const up = Math.max(8, highest((i) => inference(i) + i.finetuning_forward_tokens) || 0);
    const down = Math.max(8, highest((i) => i.finetuning_backward_tokens) || 0);
    const zero = top + (bottom - top) * 0.64;
    const y = linear(0, up, zero, top);
    const deep = linear(0, down, zero, bottom);
    const marks = (rows.length ? ticks(0, up, 2) : []).filter(Number.isInteger);
    drawAxis(
      chart.part("g", "token-grid"),
      marks.map((value) => ({ at: y(value), text: value ? `${count(value)} tok` : "0" })),
      frame,
    );
    const stack = (from, size) =>
      barPath(
        rows.map((i, n) => {
          const base = Math.min(up, from(i));
          const [low, high] = [y(base), y(Math.min(up, from(i) + size(i)))];
          return { x: left + n * slot, y: high, width: bar, height: low - high };
        }),
      );
    const parts = {
      decode: stack(() => 0, (i) => i.decode_tokens),
      prefill: stack((i) => i.decode_tokens, (i) => i.prefill_tokens),
      forward: stack(inference, (i) => i.finetuning_forward_tokens),
      backward: barPath(
        rows.map((i, n) => {
          const depth = deep(Math.min(down, i.finetuning_backward_tokens)) - zero;
          return { x: left + n * slot, y: zero, width: bar, height: depth };
        }),
      ),
    };
    for (const [name, path] of Object.entries(parts)) chart.part("path", name).setAttribute("d", path);
  }

  read(index) {
    const { rows, left, slot } = this.shown;
    const i = rows[index];
    const parts = [milliseconds(i.duration_ms)];
    if (i.target_ms !== null) parts.push(`target ${milliseconds(i.target_ms)}`);
    parts.push(`expected ${milliseconds(i.predicted_ms)}`);
    const held = [
      [i.decode_tokens, "decode"],
      [i.prefill_tokens, "prefill"],
      [i.finetuning_forward_tokens, "forward"],
      [i.finetuning_loss_tokens, "loss"],
      [i.finetuning_backward_tokens, "backward"],
    ];
    parts.push(...held.filter(([n]) => n > 0).map(([n, what]) => `${count(n)} ${what}`));
    return { text: parts.join("  ·  "), x: left + (index + 0.5) * slot };
  }
}

function tile(label, unit, className) {
  const value = h("dd.value", {}, NONE);
  const small = h("dd.unit", {}, unit);
  const element = h(`div.tile${className ? `.${className}` : ""}`, {}, h("dt", {}, label), value, small);
  return { element, value, unit: small };
}

function legend() {
  const entries = [
    ["decode", "Decode"],
    ["prefill", "Prefill"],
    ["forward", "Finetuning forward"],
    ["backward", "Backward (token-layers)"],
    ["mixed", "Both in one iteration"],
    ["over", "Over target"],
    ["target", "Target"],
  ];
  const key = entries.map(([name, text]) => h("li", {}, h(`i.swatch.${name}`), text));
  return h("ul.legend", {}, ...key);
}

function targetPath(rows, left, slot, y) {
  let path = "";
  rows.forEach((i, n) => {
    if (i.target_ms === null) return;
    const [x, at] = [left + n * slot, y(i.target_ms).toFixed(1)];
    const joined = n > 0 && rows[n - 1].target_ms !== null;
    path += `${joined ? "L" : "M"}${x.toFixed(1)} ${at}H${(x + slot).toFixed(1)}`;
  });
  return path;
}

function endOf(iteration) {
  return iteration.start_time + iteration.duration_ms / 1000;
}

function lastSeconds(iterations, seconds) {
  if (!iterations.length) return [];
  const end = endOf(iterations.at(-1));
  return iterations.filter((i) => i.start_time >= end - seconds);
}

function span(iterations) {
  return iterations.length ? endOf(iterations.at(-1)) - iterations[0].start_time : NaN;
}

function median(values) {
  return quantile(values, 0.5);
}

function quantile(values, share) {
  if (!values.length) return NaN;
  const sorted = [...values].sort((a, b) => a - b);
  return sorted[Math.min(sorted.length - 1, Math.floor(share * sorted.length))];
}
