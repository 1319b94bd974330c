// Server-sent events of a streamed chat completion.

import { request } from "./api.js";

// Calls `onChunk` with each JSON object until "[DONE]" or the end.
export async function streamChat(body, onChunk, signal) {
  const response = await request("chat/completions", { method: "POST", body, signal });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (rest + value).split(/\r?\n/);
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data:")) continue;
      const data = line.slice(5).trim();
      if (data === "[DONE]") return;
      onChunk(JSON.parse(data));
    }
  }
}
