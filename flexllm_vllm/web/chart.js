// The few parts of a chart that ours share: scales, axes, and a reading under the pointer.

import { setText, svg } from "./dom.js";

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
export class Chart {
  constructor(className, label, draw) {
    this.element = svg(`svg.chart.${className}`, { role: "img", "aria-label": label });
    this.draw = draw;
    this.width = 0;
    this.height = 0;
    new ResizeObserver(([entry]) => {
      const { width, height } = entry.contentRect;
      if (width === this.width && height === this.height) return;
      [this.width, this.height] = [width, height];
      this.update();
    }).observe(this.element);
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
