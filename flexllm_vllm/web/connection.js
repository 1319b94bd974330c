// The light in the header: live, away (with the time to the next try), or what the server says.

import { setText } from "./dom.js";

export class Connection {
  constructor(onRetry) {
    this.light = document.getElementById("connection");
    this.text = document.getElementById("connection-text");
    this.banner = document.getElementById("banner");
    this.bannerText = document.getElementById("banner-text");
    this.nextTry = null;
    document.getElementById("retry").addEventListener("click", onRetry);
    setInterval(() => this.tick(), 1000);
  }

  show(state, detail) {
    this.light.dataset.state = state;
    this.nextTry = state === "away" ? detail : null;
    this.banner.hidden = state === "live";
    setText(this.text, { live: "Live", away: "Away", error: "Error" }[state]);
    if (state === "error") setText(this.bannerText, detail);
    this.tick();
  }

  tick() {
    if (this.nextTry === null) return;
    const seconds = Math.max(0, Math.ceil((this.nextTry - Date.now()) / 1000));
    const text = `The server does not answer. What you see may be old. Next try in ${seconds} s.`;
    setText(this.bannerText, text);
  }
}
