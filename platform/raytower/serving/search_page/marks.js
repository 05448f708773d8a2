// Highlights: the words of the query in a text. Scripts without spaces between words (Chinese, Japanese, Thai …) are
// matched by pairs of neighbouring characters: 汽车保险 marks 车险 not at all, and 汽车 in 汽车贷款.

const UNSPACED = ["Han", "Hiragana", "Katakana", "Hangul", "Thai", "Lao", "Khmer", "Myanmar"]
  .map((script) => `\\p{Script=${script}}`).join("");
const RUNS = new RegExp(`([${UNSPACED}ー]+)|((?:(?![${UNSPACED}ー])[\\p{L}\\p{M}\\p{N}])+)`, "gu");
const COMMON_WORDS = new Set(("a an and are as at be but by can do does for from had has have how i if in is it its me my " +
  "no not of on or our so that the their them then there they this to was we were what when where which who why will " +
  "with you your").split(" "));
const COMMON_PAIRS = new Set("什么 怎么 么样 可以 如何 是否 为何 我们 你们 他们 这个 那个 一个 哪些".split(" "));
const PARTICLES = /[的了吗呢吧啊]/u;

const folded = (word) => word.normalize("NFKC").toLowerCase();

// cars, car → car; policies, policy → policy; cancelled, cancel → cancel. Enough to see a match; not a linguist's stem.
function stem(word) {
  const singular = folded(word).replace(/ies$/, "y");
  const short = singular.replace(/(?:ing|ed|es|s|e)$/, "").replace(/(\p{L})\1$/u, "$1");
  return short.length > 2 ? short : singular;
}

function termsOf(query) {
  const allWords = [];
  const parts = new Set();
  for (const [, run, word] of query.matchAll(RUNS)) {
    if (word) { allWords.push(word); continue; }
    const characters = Array.from(run);
    if (characters.length === 1) parts.add(run);
    for (const pair of pairsOf(characters)) if (!PARTICLES.test(pair) && !COMMON_PAIRS.has(pair)) parts.add(pair);
  }
  const telling = allWords.filter((word) => !COMMON_WORDS.has(folded(word)));
  // A query of common words alone, such as "to be or not to be", is searched for those.
  const kept = telling.length || parts.size ? telling : allWords;
  return { stems: new Set(kept.map(stem)), parts };
}

function pairsOf(characters) {
  return characters.slice(1).map((character, before) => characters[before] + character);
}

// [start, end) of each passage of the text that the query names, in order and apart from one another.
function passagesOf(text, { stems, parts }) {
  const found = [];
  const add = (start, end) => {
    const last = found.at(-1);
    if (last && start <= last[1]) last[1] = end;
    else found.push([start, end]);
  };
  for (const match of text.matchAll(RUNS)) {
    const [whole, run] = match;
    if (run === undefined) {
      if (stems.has(stem(whole))) add(match.index, match.index + whole.length);
      continue;
    }
    let start = match.index;
    const characters = Array.from(run);
    characters.forEach((character, position) => {
      const next = characters[position + 1] ?? "";
      if (next && parts.has(character + next)) add(start, start + character.length + next.length);
      else if (parts.has(character)) add(start, start + character.length);
      start += character.length;
    });
  }
  return found;
}

// The text from `start` to `end` as nodes, its passages in <mark>.
function markedText(text, passages, start = 0, end = text.length) {
  const nodes = document.createDocumentFragment();
  let from = start;
  for (const [first, last] of passages) {
    if (last <= from || first >= end) continue;
    nodes.append(text.slice(from, Math.max(from, first)), element("mark", text.slice(Math.max(from, first), Math.min(last, end))));
    from = Math.min(last, end);
  }
  nodes.append(text.slice(from, end));
  return nodes;
}
