// What goes to the server and what comes back.

// The page's own folder, whatever prefix a proxy puts before it and whether or not its address ends with a slash. The
// origin stands in front because an address like //name/v1 would be another host's.
const BASE = `${location.origin}${location.pathname.replace(/\/*$/, "/")}`;

// `lines` are shown to the person. `status` 401 asks for a key; with `again`, the same may work later.
class Refusal extends Error {
  constructor(lines, { status = 0, again = false } = {}) {
    super(lines[0]);
    Object.assign(this, { lines, status, again });
  }
}

// The answer to a request; `body` is JSON text, or undefined for a GET. Throws a Refusal, or fetch's AbortError.
async function ask(path, body, signal) {
  const headers = { Accept: "application/json" };
  const key = at("key").value.trim();
  if (key && !/^[\x21-\x7e]+$/.test(key)) throw new Refusal([words.badKey], { status: 401 });
  if (key) headers.Authorization = `Bearer ${key}`;
  if (body !== undefined) headers["Content-Type"] = "application/json";
  let reply, raw;
  try {
    reply = await fetch(BASE + path, { method: body === undefined ? "GET" : "POST", headers, body, signal, cache: "no-store" });
    raw = await reply.text();
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refusal([words.unreachable(error.message)], { again: true });
  }
  let answer = null;
  try { answer = parseExactly(raw); } catch { /* Not JSON, so not the server's; told below. */ }
  const message = answer?.error?.message;
  if (reply.ok && answer !== null && typeof answer === "object") return answer;
  if (reply.ok || typeof message !== "string") throw foreignAnswer(reply, raw);
  throw refusedAnswer(reply, message);
}

function refusedAnswer(reply, message) {
  const lines = [message];
  if (reply.status === 401) lines.unshift(words.needsKey);
  if (reply.status === 429) lines.unshift(words.busy);
  return withAdvice(reply, lines);
}

// Such as a gateway's page about a server that it could not reach, or a portal's page for signing in.
function foreignAnswer(reply, raw) {
  const type = reply.headers.get("Content-Type")?.split(";")[0] ?? "?";
  const title = /<title[^>]*>([^<]*)/i.exec(raw)?.[1];
  const beginning = (title ?? raw.replace(/<[^>]*>/g, " ")).replace(/\s+/g, " ").trim().slice(0, 200);
  const lines = [words.foreign(`${reply.status} ${reply.statusText}`.trim()), words.foreignType(type)];
  if (beginning) lines.push(beginning);
  return withAdvice(reply, lines);
}

function withAdvice(reply, lines) {
  const seconds = secondsToWait(reply.headers.get("Retry-After"));
  if (seconds !== null) lines.push(words.wait(seconds));
  const id = reply.headers.get("X-Request-Id");
  if (id) lines.push(words.request(id));
  return new Refusal(lines, { status: reply.status, again: reply.status === 429 || reply.status >= 500 });
}

// Retry-After is seconds or a date.
function secondsToWait(header) {
  if (!header) return null;
  const seconds = /^\d+$/.test(header) ? Number(header) : (Date.parse(header) - Date.now()) / 1000;
  return Number.isFinite(seconds) ? Math.max(0, Math.ceil(seconds)) : null;
}

// JSON text of a request. The filter is put in as the person wrote it, so that its numbers keep their digits.
function requestText(fields, filter = "") {
  const plain = JSON.stringify(fields);
  return filter ? `${plain.slice(0, -1)},"filter":${filter}}` : plain;
}
