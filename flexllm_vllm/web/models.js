// The models that the server serves: the base and its adapters.

import { getJson } from "./api.js";

export class Models {
  constructor() {
    this.bases = [];
    this.adapters = [];
    this.loaded = false;
  }

  async sync(signal) {
    const { data } = await getJson("models", { signal });
    this.bases = data.filter((card) => !card.parent);
    this.adapters = data.filter((card) => card.parent).reverse();
    this.loaded = true;
  }

  get names() {
    return [...this.bases, ...this.adapters].map((card) => card.id);
  }
}

// Options of a <select> follow a list of names; the choice stays while it is there.
export function fillSelect(select, names, preferred) {
  const now = [...select.options].map((option) => option.value);
  if (now.length === names.length && now.every((name, i) => name === names[i])) return;
  const chosen = select.value;
  select.replaceChildren(...names.map((name) => new Option(name, name)));
  if (names.includes(chosen)) select.value = chosen;
  else if (names.includes(preferred)) select.value = preferred;
}
