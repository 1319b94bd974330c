// Numbers, times and sizes for people.

const NUMBER = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const COMPACT = new Intl.NumberFormat("en", { notation: "compact", maximumFractionDigits: 1 });

export const NONE = "–";

export function count(value) {
  if (!Number.isFinite(value)) return NONE;
  return Math.abs(value) < 100_000 ? NUMBER.format(value) : COMPACT.format(value);
}

// Three digits that matter: 0.0123, 1.23, 12.3, 123.
export function decimal(value) {
  if (!Number.isFinite(value)) return NONE;
  const size = Math.abs(value);
  if (size >= 100) return NUMBER.format(value);
  if (size >= 10) return value.toFixed(1);
  if (size >= 1) return value.toFixed(2);
  if (size >= 0.001 || size === 0) return value.toFixed(size === 0 ? 0 : 3);
  return value.toExponential(1);
}

export function percent(share) {
  return Number.isFinite(share) ? `${Math.round(share * 100)}%` : NONE;
}

export function milliseconds(value) {
  if (!Number.isFinite(value)) return NONE;
  return value >= 10_000 ? `${decimal(value / 1000)} s` : `${NUMBER.format(value)} ms`;
}

export function bytes(value) {
  if (value < 1024) return `${value} B`;
  const units = ["KB", "MB", "GB"];
  let size = value;
  let unit = -1;
  while (size >= 1024 && unit < units.length - 1) {
    size /= 1024;
    unit += 1;
  }
  return `${size < 10 ? size.toFixed(1) : Math.round(size)} ${units[unit]}`;
}

export function duration(seconds) {
  if (!Number.isFinite(seconds)) return NONE;
  const s = Math.max(0, Math.round(seconds));
  if (s < 60) return `${s} s`;
  if (s < 3600) return `${Math.floor(s / 60)} min ${s % 60 ? `${s % 60} s` : ""}`.trim();
  const minutes = Math.floor((s % 3600) / 60);
  if (s < 86_400) return `${Math.floor(s / 3600)} h ${minutes} min`;
  return `${Math.floor(s / 86_400)} d ${Math.floor((s % 86_400) / 3600)} h`;
}

export function remaining(seconds) {
  if (!Number.isFinite(seconds)) return NONE;
  if (seconds < 60) return "< 1 min";
  if (seconds < 3600) return `${Math.round(seconds / 60)} min`;
  return duration(seconds);
}

export function ago(unixSeconds, now = Date.now() / 1000) {
  const seconds = now - unixSeconds;
  if (seconds < 45) return "just now";
  if (seconds < 3600) return `${Math.max(1, Math.round(seconds / 60))} min ago`;
  if (seconds < 86_400) return `${Math.round(seconds / 3600)} h ago`;
  return new Date(unixSeconds * 1000).toLocaleDateString("en", { month: "short", day: "numeric" });
}

export function clock(unixSeconds, withSeconds = false) {
  const options = { hour: "2-digit", minute: "2-digit", hourCycle: "h23" };
  if (withSeconds) options.second = "2-digit";
  return new Date(unixSeconds * 1000).toLocaleTimeString("en", options);
}

export function dateTime(unixSeconds) {
  const options = { month: "short", day: "numeric", hour: "2-digit", minute: "2-digit" };
  return new Date(unixSeconds * 1000).toLocaleString("en", { ...options, hourCycle: "h23" });
}
