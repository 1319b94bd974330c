// Tabs with the keys of the ARIA pattern: arrows move, Home and End jump.

import { h, setAttribute } from "./dom.js";

let made = 0;

export class Tabs {
  // `entries` are [title, element].
  constructor(label, entries) {
    made += 1;
    this.entries = entries.map(([title, panel], i) => {
      const id = `tabs-${made}-${i}`;
      const attributes = { type: "button", role: "tab", id: `${id}-tab`, "aria-controls": id };
      const tab = h("button.tab", attributes, title);
      tab.addEventListener("click", () => this.choose(i));
      tab.addEventListener("keydown", (event) => this.key(event, i));
      panel.id = id;
      setAttribute(panel, "role", "tabpanel");
      setAttribute(panel, "tabindex", "0");
      setAttribute(panel, "aria-labelledby", `${id}-tab`);
      return { tab, panel };
    });
    const tabs = this.entries.map(({ tab }) => tab);
    const bar = h("div.tab-bar", { role: "tablist", "aria-label": label }, ...tabs);
    this.element = h("div.tabs", {}, bar, ...this.entries.map(({ panel }) => panel));
    this.choose(0);
  }

  get chosen() {
    return this.entries[this.index].panel;
  }

  choose(index) {
    this.index = index;
    this.entries.forEach(({ tab, panel }, i) => {
      setAttribute(tab, "aria-selected", i === index ? "true" : "false");
      setAttribute(tab, "tabindex", i === index ? "0" : "-1");
      panel.hidden = i !== index;
    });
    this.onChoose?.();
  }

  key(event, index) {
    const count = this.entries.length;
    const moves = { ArrowRight: index + 1, ArrowLeft: index - 1 + count, Home: 0, End: count - 1 };
    if (!(event.key in moves)) return;
    event.preventDefault();
    const next = moves[event.key] % count;
    this.choose(next);
    this.entries[next].tab.focus();
  }
}
