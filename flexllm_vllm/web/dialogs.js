// Short messages, and the question before something is lost.

import { h } from "./dom.js";

export function toast(text, kind = "info") {
  const box = document.getElementById("toasts");
  const message = h(`div.toast.${kind}`, {}, h("span", {}, text));
  const close = h("button.quiet", { type: "button", "aria-label": "Close message" }, "×");
  close.addEventListener("click", () => message.remove());
  message.append(close);
  box.append(message);
  setTimeout(() => message.remove(), kind === "error" ? 12_000 : 5000);
}

// Resolves to whether the user agreed.
export function confirm(title, text, action) {
  const dialog = h(
    "dialog.small",
    { "aria-labelledby": "confirm-title" },
    h("h2", { id: "confirm-title" }, title),
    h("p", {}, text),
  );
  const answer = (value) => () => dialog.close(value);
  dialog.append(
    h(
      "div.actions.end",
      {},
      h("button", { type: "button", onclick: answer("") }, "Back"),
      h("button.danger", { type: "button", onclick: answer("yes") }, action),
    ),
  );
  document.body.append(dialog);
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => {
      dialog.remove();
      resolve(dialog.returnValue === "yes");
    });
  });
}

// Runs `task` with the button disabled; an error becomes a message.
export async function withButton(button, task) {
  button.disabled = true;
  try {
    return await task();
  } catch (error) {
    if (error.name !== "AbortError") toast(error.message, "error");
    return undefined;
  } finally {
    button.disabled = false;
  }
}
