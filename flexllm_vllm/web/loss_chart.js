// The loss of a job over its steps: each step, their moving average, and the evaluations.

import { Chart, drawAxis, labels, linear, linePath, ticks } from "./chart.js";
import { setAttribute, svg } from "./dom.js";
import { count, decimal } from "./format.js";

const MARGIN = { left: 42, right: 14, top: 12, bottom: 26 };

export class LossChart {
  constructor() {
    this.steps = [];
    this.evaluations = [];
    this.total = 0;
    this.chart = new Chart("loss-chart", "Loss", {
      draw: (width, height) => this.draw(width, height),
      count: () => this.steps.length,
      nearest: (x) => this.nearest(x),
      read: (index) => this.read(this.steps[index]),
    });
    this.element = this.chart.box;
    this.element.classList.add("loss-box");
  }

  update(steps, evaluations, total) {
    this.steps = steps;
    this.evaluations = evaluations;
    this.total = total;
    const last = steps[steps.length - 1];
    const label = last
      ? `Loss: ${decimal(last.train_loss)} at step ${last.step} of ${total}, ` +
        `${decimal(steps[0].train_loss)} at step ${steps[0].step}`
      : "Loss: no step yet";
    setAttribute(this.chart.element, "aria-label", label);
    this.chart.update();
  }

  draw(width, height) {
    const { chart, steps, evaluations } = this;
    const values = [
      ...steps.map((step) => step.train_loss),
      ...evaluations.map((evaluation) => evaluation.valid_loss),
    ];
    const [low, high] = range(values);
    const right = Math.max(this.total, steps.at(-1)?.step ?? 1, 2);
    this.x = linear(0, right, MARGIN.left, width - MARGIN.right);
    this.y = linear(low, high, height - MARGIN.bottom, MARGIN.top);
    const frame = { x: MARGIN.left, x2: width - MARGIN.right, y: MARGIN.top };
    frame.y2 = height - MARGIN.bottom;
    const rows = values.length ? ticks(low, high, Math.max(2, Math.round(height / 42))) : [];
    const texts = labels(rows);
    drawAxis(
      chart.part("g", "grid"),
      rows.map((value, i) => ({ at: this.y(value), text: texts[i] })),
      { ...frame, anchor: "end" },
    );
    const columns = values.length ? ticks(0, right, Math.max(2, Math.round(width / 110))) : [];
    drawAxis(
      chart.part("g", "columns"),
      columns
        .filter(Number.isInteger)
        .map((value) => ({ at: this.x(value), text: count(value) })),
      { ...frame, anchor: "middle" },
    );
    const points = thin(steps, width).map((step) => [this.x(step.step), this.y(step.train_loss)]);
    chart.part("path", "train-steps").setAttribute("d", linePath(points));
    const average = movingAverage(steps);
    const averaged = steps.map((step, i) => [this.x(step.step), this.y(average[i])]);
    const smooth = thin(averaged, width);
    chart.part("path", "train-average").setAttribute("d", linePath(smooth));
    const valid = evaluations.map((e) => [this.x(e.step), this.y(e.valid_loss)]);
    chart.part("path", "valid-line").setAttribute("d", linePath(valid));
    const dots = valid.map(([cx, cy]) => svg("circle", { cx, cy, r: 3.5 }));
    chart.part("g", "valid-dots").replaceChildren(...dots);
    const end = chart.part("circle", "train-end");
    const tip = smooth.at(-1);
    setAttribute(end, "r", tip ? 4 : 0);
    if (tip) {
      setAttribute(end, "cx", tip[0].toFixed(1));
      setAttribute(end, "cy", tip[1].toFixed(1));
    }
    chart.part("line", "cursor");
  }

  nearest(x) {
    const far = (step) => Math.abs(this.x(step.step) - x);
    return this.steps.reduce((best, step, i) => (far(step) < far(this.steps[best]) ? i : best), 0);
  }

  read(step) {
    const evaluation = this.evaluations.filter((e) => e.step <= step.step).at(-1);
    const parts = [`Step ${step.step}`, `loss ${decimal(step.train_loss)}`];
    if (evaluation) parts.push(`validation ${decimal(evaluation.valid_loss)}`);
    if (Number.isFinite(step.learning_rate)) parts.push(`lr ${decimal(step.learning_rate)}`);
    if (Number.isFinite(step.grad_norm)) parts.push(`grad norm ${decimal(step.grad_norm)}`);
    return { text: parts.join("  ·  "), x: this.x(step.step) };
  }
}

// Not many more than a point for each pixel, and always the last.
function thin(items, width) {
  const stride = Math.max(1, Math.floor(items.length / width));
  return items.filter((_, i) => (items.length - 1 - i) % stride === 0);
}

// Over some steps to both sides, fewer towards the ends.
function movingAverage(steps) {
  const sums = [0];
  for (const step of steps) sums.push(sums.at(-1) + step.train_loss);
  const widest = Math.min(10, Math.floor(steps.length / 20));
  return steps.map((_, i) => {
    const side = Math.min(widest, i, steps.length - 1 - i);
    return (sums[i + side + 1] - sums[i - side]) / (2 * side + 1);
  });
}

function range(values) {
  if (!values.length) return [0, 1];
  let low = values.reduce((a, b) => Math.min(a, b));
  let high = values.reduce((a, b) => Math.max(a, b));
  const room = (high - low || Math.abs(high) || 1) * 0.06;
  low = low >= 0 ? Math.max(0, low - room) : low - room;
  high += room;
  return [low, high];
}
