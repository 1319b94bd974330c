// Elements without markup: everything from outside becomes a text node or an attribute.

const SVG = "http://www.w3.org/2000/svg";

// h("button.primary", { onclick: f, disabled: true }, "Text", node, ...)
export function h(tag, attributes = {}, ...children) {
  return build(document.createElement(tag.split(".")[0]), tag, attributes, children);
}

export function svg(tag, attributes = {}, ...children) {
  return build(document.createElementNS(SVG, tag.split(".")[0]), tag, attributes, children);
}

function build(node, tag, attributes, children) {
  const classes = tag.split(".").slice(1);
  if (classes.length) node.setAttribute("class", classes.join(" "));
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else setAttribute(node, name, value);
  }
  node.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return node;
}

export function setAttribute(node, name, value) {
  if (value === null || value === undefined || value === false) node.removeAttribute(name);
  else if (value === true) node.setAttribute(name, "");
  else if (node.getAttribute(name) !== String(value)) node.setAttribute(name, value);
}

// Text that is the same is left alone: a selection in it stays.
export function setText(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

// Children by key, in order; what is there already is updated and keeps its focus.
export function reconcile(parent, items, key, create, update) {
  const old = new Map([...parent.children].map((child) => [child.dataset.key, child]));
  let previous = null;
  for (const item of items) {
    const name = key(item);
    let child = old.get(name);
    old.delete(name);
    if (!child) {
      child = create(item);
      child.dataset.key = name;
    }
    update?.(child, item);
    const place = previous ? previous.nextElementSibling : parent.firstElementChild;
    if (child !== place) parent.insertBefore(child, place);
    previous = child;
  }
  for (const child of old.values()) child.remove();
}

export function emptyState(title, text, ...actions) {
  return h("div.empty", {}, h("p.empty-title", {}, title), h("p", {}, text), ...actions);
}
