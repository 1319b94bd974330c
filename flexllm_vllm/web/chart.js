// The few parts of a chart that ours share: scales, axes, and a reading under the pointer.

import { h, setText, svg } from "./dom.js";

// About `wanted` round numbers from low to high.
export function ticks(low, high, wanted) {
  const span = high - low;
  if (!(span > 0)) return [low];
  const rough = span / wanted;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].find((factor) => factor * power >= rough) * power;
  const found = [];
  for (let i = Math.ceil(low / step); i * step <= high + step * 1e-9; i += 1) {
    found.push(Number((i * step).toPrecision(12)));
  }
  return found;
}

// As many decimals for all as the finest needs.
export function labels(values) {
  const decimals = values.map((value) => (String(value).split(".")[1] ?? "").length);
  const most = Math.min(6, Math.max(0, ...decimals));
  return values.map((value) => value.toFixed(most));
}

export function linear(low, high, from, to) {
  const factor = (to - from) / (high - low || 1);
  return (value) => from + (value - low) * factor;
}

export function linePath(points) {
  return points.map(([x, y], i) => `${i ? "L" : "M"}${x.toFixed(1)} ${y.toFixed(1)}`).join("");
}

export function barPath(bars) {
  return bars
    .filter(({ height }) => height > 0)
    .map(({ x, y, width, height }) => {
      const [w, d] = [width.toFixed(2), height.toFixed(1)];
      return `M${x.toFixed(2)} ${y.toFixed(1)}h${w}v${d}h-${w}z`;
    })
    .join("");
}

// An SVG that fills its box; `draw(width, height)` is called again when the box changes.
//
// A point is read with the pointer or the arrow keys: `count()` points, `nearest(x)` gives the index
// of one, `read(index)` its text and its place, { text, x }.
export class Chart {
  constructor(className, label, { draw, count, nearest, read }) {
    const attributes = { role: "img", "aria-label": label, tabindex: "0" };
    this.element = svg(`svg.chart.${className}`, attributes);
    this.reading = h("p.reading", { "aria-live": "polite" });
    this.box = h("div.chart-box", {}, this.element, this.reading);
    Object.assign(this, { draw, count, nearest, read, width: 0, height: 0, index: null });
    new ResizeObserver(([entry]) => {
      const { width, height } = entry.contentRect;
      if (width === this.width && height === this.height) return;
      [this.width, this.height] = [width, height];
      this.update();
    }).observe(this.element);
    this.element.addEventListener("pointermove", (event) => {
      this.point(this.nearest(event.clientX - this.element.getBoundingClientRect().left));
    });
    this.element.addEventListener("pointerleave", () => this.leave());
    this.element.addEventListener("blur", () => this.leave());
    this.element.addEventListener("keydown", (event) => this.key(event));
  }

  point(index) {
    const last = this.count() - 1;
    if (last < 0 || !this.width) return;
    this.index = Math.max(0, Math.min(last, index));
    const { text, x } = this.read(this.index);
    setText(this.reading, text);
    const cursor = this.part("line", "cursor");
    const place = { x1: x, x2: x, y1: 8, y2: this.height };
    for (const [name, value] of Object.entries(place)) cursor.setAttribute(name, value);
    this.box.classList.add("pointed");
  }

  leave() {
    this.index = null;
    this.box.classList.remove("pointed");
  }

  key(event) {
    const last = this.count() - 1;
    const at = this.index ?? last;
    const far = Math.max(1, Math.round(last / 10));
    const moves = { ArrowLeft: at - 1, ArrowRight: at + 1, PageDown: at + far, PageUp: at - far };
    Object.assign(moves, { Home: 0, End: last });
    if (event.key === "Escape") this.leave();
    if (!(event.key in moves)) return;
    event.preventDefault();
    this.point(moves[event.key]);
  }

  update() {
    if (this.width > 40 && this.height > 40) this.draw(this.width, this.height);
  }

  // Adds (once) and returns the group or path of this name, in the order of the first calls.
  part(tag, name) {
    this.parts ??= new Map();
    if (!this.parts.has(name)) {
      const node = svg(`${tag}.${name}`);
      this.parts.set(name, node);
      this.element.append(node);
    }
    return this.parts.get(name);
  }
}

// Lines and labels; `marks` are { at, text } in pixels.
export function drawAxis(group, marks, { x, y, x2, y2, anchor }) {
  while (group.children.length > marks.length * 2) group.lastChild.remove();
  marks.forEach(({ at, text }, i) => {
    let line = group.children[i * 2];
    let label = group.children[i * 2 + 1];
    if (!label) {
      line = svg("line");
      label = svg("text");
      group.append(line, label);
    }
    const vertical = anchor === "middle";
    const place = vertical ? [at, y, at, y2] : [x, at, x2, at];
    ["x1", "y1", "x2", "y2"].forEach((name, k) => line.setAttribute(name, place[k]));
    label.setAttribute("x", vertical ? at : x - 8);
    label.setAttribute("y", vertical ? y2 + 16 : at + 4);
    label.setAttribute("text-anchor", anchor);
    setText(label, text);
  });
}
