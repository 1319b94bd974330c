// Requests to the server's own /v1, by addresses relative to the page (--root-path).

import { askForKey, currentKey } from "./key.js";

export class ApiError extends Error {
  // `param` is the field that is wrong, as the server names it; `away`: nothing answered.
  constructor(status, message, param = null, code = null) {
    super(message);
    this.status = status;
    this.param = param;
    this.code = code;
  }

  get away() {
    return this.status === 0 || this.status === 502 || this.status === 504;
  }
}

function address(path) {
  return new URL(`v1/${path}`, document.baseURI).href;
}

// Asks for the key after a 401 and repeats the request; `body` is sent as JSON.
export async function request(path, { method = "GET", body, signal } = {}) {
  const headers = {};
  if (body !== undefined) headers["Content-Type"] = "application/json";
  const content = body === undefined ? undefined : JSON.stringify(body);
  for (;;) {
    const key = currentKey();
    if (key) headers.Authorization = `Bearer ${key}`;
    const response = await send(path, { method, headers, body: content, signal });
    if (response.ok) return response;
    if (response.status !== 401) throw errorOf(response.status, await response.text());
    await askForKey(key);
  }
}

async function send(path, options) {
  try {
    return await fetch(address(path), { ...options, cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(0, "The server does not answer.");
  }
}

export async function getJson(path, options) {
  return (await request(path, options)).json();
}

export async function postJson(path, body) {
  return (await request(path, { method: "POST", body })).json();
}

// XMLHttpRequest, since fetch does not tell how much of an upload has gone out.
export async function uploadFile(file, onProgress, signal) {
  for (;;) {
    const key = currentKey();
    const { status, text } = await sendFile(file, key, onProgress, signal);
    if (status >= 200 && status < 300) return JSON.parse(text);
    if (status !== 401) throw errorOf(status, text);
    await askForKey(key);
  }
}

function sendFile(file, key, onProgress, signal) {
  return new Promise((resolve, reject) => {
    const form = new FormData();
    form.append("purpose", "fine-tune");
    form.append("file", file, file.name);
    const upload = new XMLHttpRequest();
    upload.open("POST", address("files"));
    if (key) upload.setRequestHeader("Authorization", `Bearer ${key}`);
    upload.upload.addEventListener("progress", (event) => {
      if (event.lengthComputable) onProgress(event.loaded / event.total);
    });
    upload.addEventListener("load", () => {
      resolve({ status: upload.status, text: upload.responseText });
    });
    upload.addEventListener("error", () => {
      reject(new ApiError(0, "The upload was cut off. Try again."));
    });
    upload.addEventListener("abort", () => reject(new DOMException("stopped", "AbortError")));
    signal.addEventListener("abort", () => upload.abort());
    upload.send(form);
  });
}

// Through a request of our own, since a link cannot carry the key.
export async function download(path, filename) {
  const blob = await (await request(path)).blob();
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = filename;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
}

function errorOf(status, text) {
  let error = {};
  try {
    const body = JSON.parse(text);
    error = typeof body.error === "object" ? body.error : { message: body.error ?? body.detail };
  } catch {
    // A proxy's error page.
  }
  const message = typeof error?.message === "string" ? error.message : `Status ${status}`;
  return new ApiError(status, message, error?.param ?? null, error?.code ?? null);
}
