// What the person does, and the state of the page in its address: #q=…&k=10. What stands behind # stays in the browser,
// so queries are not written to the access logs of servers on the way.

const TOOLS = ["search", "similarity", "classify"];

let tool = "search";
let collections = null;  // null: not asked yet, or asked in vain
let asking = null;       // the question to the server about its collections, while it runs
let running = null;      // the AbortController of the newest request
let redraw = () => {};   // shows the newest answer again, after the language changed
let shownHits = [];
let wanted = new URLSearchParams();  // the address as it was opened; its choices count once the collections are known

// The collection that is searched. Undefined where the server does not list them.
function collection() {
  const named = collections?.find((one) => one.name === at("collection").value);
  return named ?? collections?.find((one) => one.default) ?? collections?.[0];
}

// --- what the server offers ---------------------------------------------------------------------------------------

// Asks once; a failed question is asked again by the next search.
async function learnCollections() {
  if (collections !== null) return;
  asking ??= askCollections().finally(() => { asking = null; });
  await asking;
}

async function askCollections() {
  let listed = [];
  try {
    listed = (await ask("v1/collections")).data;
  } catch (refusal) {
    // A server without this route still searches.
    if (refusal.status !== 404) throw refusal;
  }
  const first = collections === null;
  const chosen = at("collection").value;
  collections = Array.isArray(listed) ? listed : [];
  at("collection").replaceChildren(...collections.map((one) => new Option(one.name, one.name)));
  if (first) chooseWanted();
  else chooseCollection(chosen);
}

function fill(select, values, names) {
  const before = select.value;
  select.replaceChildren(...values.map((value) => new Option(names[value] ?? value, value)));
  if (values.includes(before)) select.value = before;
}

// Only the controls that do something for this collection.
function showControls() {
  const one = collection();
  const modes = one?.modes ?? [], ways = one?.classify_modes ?? [];
  const columns = Object.keys(one?.columns ?? {});
  at("collection-row").hidden = (collections?.length ?? 0) < 2;
  fill(at("mode"), modes, words.modes);
  at("mode-row").hidden = modes.length < 2;
  at("rerank-row").hidden = at("compare-row").hidden = !one?.reranker;
  fill(at("column"), columns, {});
  fill(at("operator"), Object.keys(words.operators), words.operators);
  at("condition").hidden = columns.length === 0;
  fill(at("way"), ways, words.ways);
  at("way-row").hidden = ways.length < 2;
  at("to-classify").hidden = ways.length === 0;
  if (one) showAbout(one);
  showFilterState();
}

const reranks = () => Boolean(collection()?.reranker) && at("rerank").checked;
const compares = () => reranks() && at("compare").checked;

// --- the address --------------------------------------------------------------------------------------------------

function address() {
  const one = collection();
  const several = collections?.length > 1 ? { collection: one.name } : {};
  if (tool === "similarity") return new URLSearchParams({ tool, a: at("first").value, b: at("second").value, ...several });
  if (tool === "classify") return new URLSearchParams({ tool, text: at("text").value, ...several });
  const state = new URLSearchParams({ q: at("query").value, k: at("k").value, ...several });
  if (one?.reranker) state.set("rerank", at("rerank").checked);
  if (compares()) state.set("view", "compare");
  if (one?.modes?.length > 1) state.set("mode", at("mode").value);
  if (at("filter").value.trim()) state.set("filter", at("filter").value.trim());
  return state;
}

function rememberAddress() {
  const hash = `#${address()}`;
  if (hash !== location.hash) history.pushState(null, "", hash);
}

function openAddress() {
  wanted = new URLSearchParams(location.hash.slice(1));
  const asked = wanted;
  at("query").value = asked.get("q") ?? "";
  at("k").value = asked.get("k") ?? "10";
  at("filter").value = asked.get("filter") ?? "";
  at("filter-box").open = asked.has("filter");
  at("first").value = asked.get("a") ?? "";
  at("second").value = asked.get("b") ?? "";
  at("text").value = asked.get("text") ?? "";
  showTool(TOOLS.includes(asked.get("tool")) ? asked.get("tool") : "search");
  if (collections) chooseWanted();
  const complete = tool === "search" ? asked.get("q")?.trim() : tool === "similarity" ? asked.get("a") && asked.get("b")
    : asked.get("text");
  if (complete) submitOpened();
  else start(() => {});
}

// The collection of that name, else the default one.
function chooseCollection(name) {
  at("collection").value = name ?? "";
  at("collection").value = collection()?.name ?? "";
  showControls();
}

// The choices of the address among those that the collection offers.
function chooseWanted() {
  chooseCollection(wanted.get("collection"));
  at("rerank").checked = wanted.get("rerank") !== "false";
  at("compare").checked = wanted.get("view") === "compare";
  const modes = collection()?.modes ?? [];
  at("mode").value = modes.includes(wanted.get("mode")) ? wanted.get("mode") : modes[0] ?? "";
}

function submitOpened() {
  checkFilter();
  if (at(tool).reportValidity()) run();
  else start(() => {});
}

// --- requests -----------------------------------------------------------------------------------------------------

function showTool(name) {
  tool = name;
  for (const one of TOOLS) {
    at(one).hidden = one !== name;
    if (one === name) at(`to-${one}`).ariaCurrent = "page";
    else at(`to-${one}`).removeAttribute("aria-current");
  }
  forget();
}

function forget() {
  running?.abort();
  running = null;
  redraw = () => {};
  at("error").hidden = at("timings").hidden = true;
  at("answer").ariaBusy = "false";
  at("answer").replaceChildren();
  at("notices").replaceChildren();
  at("status").textContent = "";
}

// Runs `work` as the newest request: an older one is aborted, and its answer never shown.
async function start(work, busyWords = "") {
  running?.abort();
  const mine = running = new AbortController();
  at("error").hidden = true;
  at("status").textContent = busyWords;
  at("answer").ariaBusy = String(Boolean(busyWords));
  try {
    await learnCollections();
    if (mine !== running) return;
    const draw = await work(mine.signal);
    if (mine !== running) return;
    at("key-form").hidden = true;
    redraw = draw ?? (() => {});
    redraw();
  } catch (error) {
    if (mine !== running || error.name === "AbortError") return;
    forget();
    const refusal = error instanceof Refusal ? error : new Refusal([words.foreign(`200 (${error.message})`)]);
    showRefusal(refusal, run);
    if (refusal.status === 401) { at("key-form").hidden = false; at("key").focus(); }
  } finally {
    if (mine === running) at("answer").ariaBusy = "false";
  }
}

function run() {
  const work = { search: searchWork, similarity: similarityWork, classify: classifyWork }[tool];
  start(work, tool === "search" ? words.searching : words.working);
}

// The route of a tool for the chosen collection.
const route = () => (collections.length > 1 ? `v1/${encodeURIComponent(collection().name)}/${tool}` : `v1/${tool}`);

async function searchWork(signal) {
  const one = collection(), query = at("query").value, filter = filterText();
  const fields = { query, k: at("k").valueAsNumber };
  if (one?.modes?.length > 1) fields.mode = at("mode").value;
  const rerank = reranks(), compare = compares();
  const path = route();
  const send = (more) => ask(path, requestText({ ...fields, ...more }, filter), signal);
  const questions = [];
  if (!one) questions.push(send({}));
  else questions.push(send(rerank ? { rerank, explain: true } : { rerank }));
  if (compare) questions.push(send({ rerank: false }));
  const [answer, recalled] = await Promise.all(questions);
  for (const each of [answer, recalled]) if (each && !Array.isArray(each.results?.[0])) throw new Error("results");
  refreshLater(one, answer);
  return () => showSearch({ query, filter, rerank, answer, recalled });
}

// Another index version than the one that the page describes: the description is asked for again. Where that fails, the
// old one stays.
function refreshLater(one, answer) {
  if (one && one.index_version !== answer.index_version) askCollections().catch(() => {});
}

function showSearch({ query, filter, rerank, answer, recalled }) {
  const hits = answer.results[0], terms = termsOf(query);
  const notices = noticesOf(answer, rerank);
  if (recalled && recalled.index_version !== answer.index_version) notices.push(words.versionsDiffer);
  showNotices(notices);
  const found = hits.length ? words.results(grouped(hits.length)) : filter ? words.nothingFiltered : words.nothing;
  const parts = [answer.reranked ? words.reranked(found) : rerank ? words.notReranked(found) : found];
  if (answer.timings_ms) {
    parts.push(words.ms(Number(answer.timings_ms.total).toFixed(1)));
    showTimings(answer.timings_ms);
  }
  at("status").textContent = [...parts, words.index(answer.index_version)].join(" · ");
  const compare = recalled && answer.reranked;
  const shown = compare ? sideBySide(recalled, answer, terms)
    : resultList(hits, terms, answer.reranked, (hit) => (answer.reranked ? movedBadge(hit.explain) : ""));
  at("answer").replaceChildren(shown);
  shownHits = hits;
  offerValues(hits);
}

async function similarityWork(signal) {
  const answer = await ask(route(), requestText({ pairs: [[at("first").value, at("second").value]] }), signal);
  if (!Array.isArray(answer.scores)) throw new Error("scores");
  return () => { showSimilarity(answer); showCut(answer); };
}

async function classifyWork(signal) {
  const fields = { texts: [at("text").value], top_k: at("top").valueAsNumber };
  if (at("way").value) fields.mode = at("way").value;
  const answer = await ask(route(), requestText(fields), signal);
  if (!Array.isArray(answer.results?.[0])) throw new Error("results");
  return () => { showLabels(answer); showCut(answer); };
}

function showCut(answer) {
  showNotices(Number(answer.usage?.truncated) > 0 ? [words.textsCut] : []);
}

// --- events -------------------------------------------------------------------------------------------------------

function onSubmit(event) {
  event.preventDefault();
  rememberAddress();
  run();
}

function searchAgain() {
  if (at("query").value.trim()) at("search").requestSubmit();
}

for (const name of TOOLS) {
  at(name).addEventListener("submit", onSubmit);
  at(`to-${name}`).addEventListener("click", () => {
    if (tool === name) return;
    showTool(name);
    at(name).querySelector("input, textarea").focus();
    rememberAddress();
  });
}
at("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  if (at(tool).checkValidity()) run();
  else start(() => {});
});
for (const id of ["rerank", "mode", "compare"]) at(id).addEventListener("change", searchAgain);
at("compare").addEventListener("change", () => { if (at("compare").checked && !at("rerank").checked) at("rerank").click(); });
at("collection").addEventListener("change", () => {
  showControls();
  if (at(`to-${tool}`).hidden) at("to-search").click();
  else if (at(tool).checkValidity()) at(tool).requestSubmit();
});
at("filter").addEventListener("input", () => { checkFilter(); showFilterState(); });
at("add-condition").addEventListener("click", addCondition);
at("value").addEventListener("input", () => at("value").setCustomValidity(""));
at("value").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.isComposing) { event.preventDefault(); addCondition(); }
});
at("column").addEventListener("change", () => offerValues(shownHits));
at("clear-filter").addEventListener("click", () => { at("filter").value = ""; checkFilter(); filterChanged(); });
at("language").addEventListener("click", () => {
  chooseLanguage(language === "zh" ? "en" : "zh");
  sayEverything();
  showControls();
  redraw();
});
document.addEventListener("keydown", (event) => {
  const free = event.key === "/" && !event.ctrlKey && !event.metaKey && !event.altKey;
  if (!free || document.activeElement.matches("input, textarea, select")) return;
  event.preventDefault();
  if (tool !== "search") at("to-search").click();
  at("query").select();
});
// A link opened in this tab, Back and Forward.
addEventListener("popstate", openAddress);

sayEverything();
showControls();
openAddress();
