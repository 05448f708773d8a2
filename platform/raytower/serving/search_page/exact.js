// JSON whose numbers keep their digits. JavaScript reads 9007199254740993 as 9007199254740992.

const JSON_NUMBER = /^-?(?:0|[1-9]\d*)(?:\.\d+)?(?:[eE][+-]?\d+)?$/;

class Digits {
  constructor(source) { this.source = source; }
  valueOf() { return Number(this.source); }
}

// Whether a number of JSON loses digits as a double. How a fraction is spelled (1.0, 1e-7) may change.
function isRounded(source) {
  if (!JSON_NUMBER.test(source)) return false;
  const read = String(Number(source));
  if (/^-?\d+$/.test(source)) return read !== source;
  const significant = (number) => number.replace(/e.*/i, "").replace(/[-.]/g, "").replace(/^0+|0+$/g, "");
  return significant(read) !== significant(source);
}

// Numbers that would be rounded come back as Digits. They travel through JSON.parse as strings with a random mark,
// since not every browser lets a reviver see the source of a number.
function parseExactly(json) {
  const mark = `${Math.random()} `;
  const marked = outsideStrings(json, (between) =>
    between.replace(/-?\d[\d.eE+-]*/g, (source) => (isRounded(source) ? `"${mark}${source}"` : source)));
  return JSON.parse(marked, (_, value) =>
    typeof value === "string" && value.startsWith(mark) ? new Digits(value.slice(mark.length)) : value);
}

function outsideStrings(json, change) {
  const parts = [];
  for (let from = 0; from < json.length;) {
    const quote = json.indexOf('"', from);
    if (quote < 0) { parts.push(change(json.slice(from))); break; }
    const end = endOfString(json, quote);
    parts.push(change(json.slice(from, quote)), json.slice(quote, end));
    from = end;
  }
  return parts.join("");
}

function endOfString(json, quote) {
  for (let end = json.indexOf('"', quote + 1); end >= 0; end = json.indexOf('"', end + 1)) {
    let slashes = 0;
    while (json[end - 1 - slashes] === "\\") slashes++;
    if (slashes % 2 === 0) return end + 1;
  }
  return json.length;
}

// A value as JSON, with the digits that it came with.
function written(value) {
  if (value instanceof Digits) return value.source;
  if (Array.isArray(value)) return `[${value.map(written).join(", ")}]`;
  if (value === null || typeof value !== "object") return JSON.stringify(value);
  return `{${Object.entries(value).map(([name, member]) => `${JSON.stringify(name)}: ${written(member)}`).join(", ")}}`;
}

const asShown = (value) => (typeof value === "string" ? value : written(value));
