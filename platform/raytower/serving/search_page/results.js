// Answers as the page shows them. All texts go in through textContent.

const SHOWN_CHARACTERS = 700;
const STAGES = ["encode", "recall", "fetch", "rerank"];

const at = (id) => document.getElementById(id);

function element(tag, text, className) {
  const node = document.createElement(tag);
  if (text !== undefined) node.textContent = text;
  if (className) node.className = className;
  return node;
}

// Chinese and Japanese share characters that are drawn differently; the language picks the font's forms.
function languageOf(text) {
  if (/[\u3040-\u30ff]/.test(text)) return "ja";
  if (/[\uac00-\ud7af]/.test(text)) return "ko";
  return /[\u3400-\u9fff]/.test(text) ? "zh" : "";
}

const decimals = (number) => (number === null || number === undefined ? "–" : Number(number).toFixed(4));

function figures(pairs, className) {
  const list = element("dl", undefined, className);
  for (const [name, value] of pairs) {
    const pair = element("div");
    pair.append(element("dt", name), element("dd", value));
    list.append(pair);
  }
  return list;
}

// The text with its highlights; of a long one, what is around the first of them, and a button for all of it.
function passage(text, terms) {
  const box = element("div", undefined, "text");
  const body = element("p");
  body.dir = "auto";
  if (languageOf(text)) body.lang = languageOf(text);
  const passages = passagesOf(text, terms);
  box.append(body);
  if (text.length <= SHOWN_CHARACTERS * 1.2) {
    body.append(markedText(text, passages));
    return box;
  }
  const start = characterStart(text, Math.max(0, Math.min((passages[0]?.[0] ?? 0) - 150, text.length - SHOWN_CHARACTERS)));
  const end = characterStart(text, start + SHOWN_CHARACTERS);
  const button = element("button", undefined, "quiet small");
  button.type = "button";
  const show = (all) => {
    body.replaceChildren(...(all ? [markedText(text, passages)]
      : [start ? "… " : "", markedText(text, passages, start, end), end < text.length ? " …" : ""]));
    button.textContent = all ? words.less : words.more;
    button.ariaExpanded = String(all);
  };
  button.addEventListener("click", () => show(button.ariaExpanded === "false"));
  show(false);
  box.append(button);
  return box;
}

// A position that does not cut a character of two units.
function characterStart(text, position) {
  return /[\udc00-\udfff]/.test(text[position] ?? "") ? position - 1 : position;
}

function badge(sign, meaning, className) {
  const node = element("span", undefined, `badge ${className}`);
  const drawn = element("span", sign);
  drawn.ariaHidden = "true";
  node.append(drawn, element("span", meaning, "for-readers"));
  node.title = meaning;
  return node;
}

// How far the reranker moved a hit; nothing where the answer does not explain it.
function movedBadge(explain) {
  const moved = explain?.moved;
  if (moved === null || moved === undefined) return "";
  const from = words.cameFrom(explain.recall_rank);
  if (moved > 0) return badge(`↑${moved}`, `${words.up(moved)}, ${from}`, "up");
  if (moved < 0) return badge(`↓${-moved}`, `${words.down(-moved)}, ${from}`, "down");
  return badge("=", words.stayed, "same");
}

function scoresOf(hit, reranked) {
  const scores = [[words.recallScore, decimals(hit.recall_score)]];
  if (reranked) scores.push([words.rerankScore, decimals(hit.rerank_score)]);
  if (reranked || hit.score !== hit.recall_score) scores.push([words.score, decimals(hit.score)]);
  return figures(scores, "scores");
}

function card(hit, terms, reranked, mark = "") {
  const node = element("li");
  const head = element("div", undefined, "head");
  head.append(element("span", String(hit.rank), "rank"), element("span", hit.id, "id"), mark);
  node.append(head);
  if (typeof hit.text === "string") node.append(passage(hit.text, terms));
  node.append(scoresOf(hit, reranked));
  const metadata = Object.entries(hit.metadata ?? {}).map(([name, value]) => [name, asShown(value)]);
  if (metadata.length) node.append(figures(metadata, "metadata"));
  return node;
}

function resultList(hits, terms, reranked, markOf) {
  const list = element("ol", undefined, "results");
  list.append(...hits.map((hit) => card(hit, terms, reranked, markOf(hit))));
  return list;
}

// The order of recall beside the order after reranking, with where each hit went and came from.
function sideBySide(recalled, answer, terms) {
  const before = recalled.results[0], after = answer.results[0];
  const rankAfter = new Map(after.map((hit) => [hit.id, hit.rank]));
  const rankBefore = new Map(before.map((hit) => [hit.id, hit.rank]));
  const wentTo = (hit) => {
    const rank = rankAfter.get(hit.id);
    if (rank === undefined) return badge("×", words.left, "down");
    return rank === hit.rank ? badge("=", words.stayed, "same")
      : badge(`→ ${rank}`, words.goesTo(rank), rank < hit.rank ? "up" : "down");
  };
  const cameFrom = (hit) => {
    const from = hit.explain?.recall_rank ?? rankBefore.get(hit.id);
    return movedBadge({ recall_rank: from, moved: from === undefined ? null : from - hit.rank });
  };
  const box = element("div", undefined, "columns");
  for (const [title, hits, reranked, markOf] of [
    [words.recallOrder, before, false, wentTo], [words.rerankedOrder, after, true, cameFrom]]) {
    const column = element("section");
    column.append(element("h2", title), resultList(hits, terms, reranked, markOf));
    box.append(column);
  }
  return box;
}

// One bar, in which each stage takes its share of the time, and the figures below it.
function showTimings(timings) {
  const stages = STAGES.filter((stage) => timings[stage] !== null && timings[stage] !== undefined)
    .map((stage) => [stage, Number(timings[stage])]);
  const rest = Number(timings.total) - stages.reduce((sum, [, time]) => sum + time, 0);
  if (rest > 0) stages.push(["other", rest]);
  const track = element("div", undefined, "track");
  track.ariaHidden = "true";
  track.append(...stages.map(([stage, time]) => {
    const bar = element("span", undefined, `stage ${stage}`);
    bar.style.flexGrow = time;
    return bar;
  }));
  const list = figures(stages.map(([stage, time]) => [words.stages[stage], words.ms(time.toFixed(1))]));
  stages.forEach(([stage], position) => {
    const dot = element("span", undefined, `stage dot ${stage}`);
    list.children[position].firstChild.prepend(dot);
  });
  at("timings").replaceChildren(track, list);
  at("timings").hidden = false;
}

// What the person must know about an answer beside its results.
function noticesOf(answer, askedToRerank) {
  const notices = [];
  if (answer.partial) {
    const shards = answer.missing_shards ?? [];
    notices.push(words.partial + (shards.length ? ` ${words.missingShards(shards.map(asShown).join(", "))}` : ""));
  }
  if (Number(answer.usage?.truncated) > 0) notices.push(words.queryCut);
  if (askedToRerank && !answer.reranked) notices.push(words.rerankSkipped);
  else if (answer.reranked && answer.results[0].some((hit) => hit.rerank_score === null))
    notices.push(words.rerankPart(answer.reranked_k ?? "?"));
  return notices;
}

function showNotices(notices) {
  at("notices").replaceChildren(...notices.map((notice) => element("p", notice, "notice warning")));
}

function showRefusal(refusal, retry) {
  const lines = refusal.lines.map((line) => element("p", line));
  if (refusal.again) {
    const button = element("button", words.tryAgain, "quiet small");
    button.type = "button";
    button.addEventListener("click", retry);
    lines.push(button);
  }
  at("error").replaceChildren(...lines);
  at("error").hidden = false;
}

function showAbout(collection) {
  const about = words.about;
  const recall = collection.recall === null || collection.recall === undefined
    ? about.unmeasured : `${about.recall} ${asShown(measuredRecall(collection.recall))}`;
  const parts = [`${about.version} ${collection.index_version}`, `${grouped(collection.rows)} ${about.rows}`, recall,
    `${collection.kind}, ${collection.metric}, ${collection.dim} ${about.dimensions}`,
    `${about.encoder} ${collection.encoder?.name ?? "?"}`,
    collection.reranker ? `${about.reranker} ${collection.reranker.name ?? ""}`.trim() : about.noReranker];
  at("about").textContent = parts.join(" · ");
  at("about").hidden = false;
}

// A manifest may hold one figure, or one for each of several depths.
function measuredRecall(recall) {
  return typeof recall === "number" ? Number(recall.toFixed(4)) : recall;
}

function showSimilarity(answer) {
  const score = Number(answer.scores[0]);
  const meter = element("meter");
  Object.assign(meter, { min: -1, max: 1, value: score, ariaLabel: words.cosine });
  at("status").textContent = `${words.cosine}: ${decimals(score)}`;
  at("answer").replaceChildren(meter, figures([[words.about.encoder, String(answer.model)]], "scores"));
}

function showLabels(answer) {
  const list = element("ol", undefined, "labels");
  for (const { label, score } of answer.results[0]) {
    const meter = element("meter");
    // A vote or a probability is at most 1, and so is the cosine of a label.
    Object.assign(meter, { min: 0, max: 1, value: Number(score), ariaLabel: label });
    const node = element("li");
    node.append(element("span", label.split("##").join(" › ")), meter, element("span", decimals(score), "figure"));
    list.append(node);
  }
  at("status").textContent = `${words.ways[answer.mode] ?? answer.mode} · ${answer.model}`;
  at("answer").replaceChildren(list);
}
