// The server's key: kept for this tab (sessionStorage), asked for when the server answers 401.

const NAME = "flexllm-key";

let asking = null;

export function currentKey() {
  return sessionStorage.getItem(NAME) ?? "";
}

export function forgetKey() {
  sessionStorage.removeItem(NAME);
}

// Resolves when there is another key than the refused one. Asks once, however many wait for it.
export function askForKey(refused) {
  if (currentKey() !== refused) return Promise.resolve();
  asking ??= ask(refused).finally(() => {
    asking = null;
  });
  return asking;
}

function ask(refused) {
  const dialog = document.getElementById("key-dialog");
  const input = document.getElementById("key-input");
  const problem = document.getElementById("key-problem");
  problem.textContent = refused ? "The server does not accept this key." : "";
  input.setAttribute("aria-invalid", refused ? "true" : "false");
  input.value = "";
  return new Promise((resolve) => {
    const form = document.getElementById("key-form");
    form.onsubmit = (event) => {
      event.preventDefault();
      const key = input.value.trim();
      if (!key) return;
      sessionStorage.setItem(NAME, key);
      dialog.close();
      resolve();
      window.dispatchEvent(new Event("key"));
    };
    // Nothing works without the key: Escape leaves the question open.
    dialog.oncancel = (event) => event.preventDefault();
    dialog.onclose = () => {
      if (currentKey() === refused) dialog.showModal();
    };
    dialog.showModal();
    input.focus();
  });
}
