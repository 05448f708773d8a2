// Every word of the page, in the languages that it speaks.
const LANGUAGES = { en: "English", zh: "中文" };

const WORDS = {
  en: {
    locale: "en",
    tools: "Tools", search: "Search", similarity: "Similarity", classify: "Classification",
    query: "Query", queryHint: "Ask, or describe what you look for",
    collection: "Collection", count: "Results", mode: "Mode", rerank: "Rerank", sideBySide: "Side by side",
    modes: { dense: "by meaning", lexical: "by words", hybrid: "both" },
    filter: "Filter", filterSet: "Filter (set)", filterJson: "Filter as JSON", condition: "Add a condition",
    column: "Column", operator: "Comparison", value: "Value", add: "Add", clear: "Clear",
    operators: { $eq: "is", $ne: "is not", $gt: "above", $gte: "at least", $lt: "below", $lte: "at most",
      $in: "one of (comma)" },
    badFilter: "The filter must be a JSON object, such as {\"lang\": \"en\"}",
    badNumber: "This column holds numbers", badBoolean: "This column holds true or false",
    firstText: "First text", secondText: "Second text", measure: "Compare", cosine: "Cosine similarity",
    textToClassify: "Text", way: "By", labels: "Labels", doClassify: "Classify",
    ways: { classifier: "classifier", labels: "nearest label", votes: "votes of neighbours" },
    key: "API key", useKey: "Use key", needsKey: "The server asks for an API key.",
    badKey: "An API key has no spaces and no letters beyond ASCII.",
    searching: "Searching …", working: "Working …",
    results: (count) => `${count} ${count === "1" ? "result" : "results"}`,
    nothing: "Nothing found.", nothingFiltered: "No document that passes the filter was found.",
    reranked: (found) => `${found}, reranked`, notReranked: (found) => `${found}, not reranked`, index: (version) => `index ${version}`,
    ms: (time) => `${time} ms`,
    stages: { encode: "encode", recall: "recall", fetch: "fetch", rerank: "rerank", other: "waiting and other" },
    recallScore: "recall", rerankScore: "rerank", score: "score",
    about: { version: "Index", rows: "rows", recall: "measured recall", unmeasured: "recall not measured",
      encoder: "encoder", dimensions: "dimensions", reranker: "reranker", noReranker: "no reranker" },
    recallOrder: "Order of recall", rerankedOrder: "Order after reranking",
    up: (steps) => `up ${steps}`, down: (steps) => `down ${steps}`, stayed: "unmoved",
    cameFrom: (rank) => `from ${rank}`, goesTo: (rank) => `to ${rank}`, left: "left the list",
    more: "Show all", less: "Show less",
    partial: "A part of the index did not answer in time: these results are incomplete.",
    missingShards: (shards) => `Missing shards: ${shards}.`,
    queryCut: "The query was longer than the model reads; its end was not read.",
    textsCut: "A text was longer than the model reads; its end was not read.",
    rerankSkipped: "Not reranked: the time did not suffice. These results are in the order of recall.",
    rerankPart: (count) => `The time sufficed for ${count} candidates: the others were not reranked.`,
    versionsDiffer: "The index changed between the two answers: the orders are of two versions.",
    tryAgain: "Try again", wait: (seconds) => `The server asks to try again in ${seconds} s.`,
    busy: "The server is busy.",
    unreachable: (reason) => `The server cannot be reached (${reason}).`,
    foreign: (status) => `HTTP ${status}: the answer is not the search server's.`,
    foreignType: (type) => `A proxy or gateway on the way answered, with ${type}:`,
    request: (id) => `Request ${id}`,
  },
  zh: {
    locale: "zh-CN",
    tools: "工具", search: "搜索", similarity: "相似度", classify: "分类",
    query: "查询", queryHint: "输入问题，或描述您要找的内容",
    collection: "集合", count: "结果数", mode: "方式", rerank: "重排", sideBySide: "并排比较",
    modes: { dense: "按语义", lexical: "按词语", hybrid: "语义加词语" },
    filter: "筛选", filterSet: "筛选（已设）", filterJson: "JSON 筛选条件", condition: "添加条件",
    column: "列", operator: "比较", value: "值", add: "添加", clear: "清除",
    operators: { $eq: "等于", $ne: "不等于", $gt: "大于", $gte: "至少", $lt: "小于", $lte: "至多",
      $in: "其中之一（逗号分隔）" },
    badFilter: "筛选条件须为 JSON 对象，例如 {\"lang\": \"zh\"}",
    badNumber: "此列为数值", badBoolean: "此列为 true 或 false",
    firstText: "第一段文本", secondText: "第二段文本", measure: "比较", cosine: "余弦相似度",
    textToClassify: "文本", way: "方法", labels: "标签数", doClassify: "分类",
    ways: { classifier: "分类模型", labels: "最近标签", votes: "近邻投票" },
    key: "API 密钥", useKey: "使用密钥", needsKey: "服务器要求提供 API 密钥。",
    badKey: "API 密钥不含空格，也不含 ASCII 以外的字符。",
    searching: "正在搜索……", working: "正在计算……",
    results: (count) => `${count} 条结果`,
    nothing: "没有找到结果。", nothingFiltered: "没有符合筛选条件的文档。",
    reranked: (found) => `${found}，已重排`, notReranked: (found) => `${found}，未重排`, index: (version) => `索引 ${version}`,
    ms: (time) => `${time} 毫秒`,
    stages: { encode: "编码", recall: "召回", fetch: "取文", rerank: "重排", other: "等待及其他" },
    recallScore: "召回分", rerankScore: "重排分", score: "得分",
    about: { version: "索引", rows: "行", recall: "实测召回率", unmeasured: "召回率未测",
      encoder: "编码器", dimensions: "维", reranker: "重排模型", noReranker: "无重排模型" },
    recallOrder: "召回顺序", rerankedOrder: "重排后顺序",
    up: (steps) => `上升 ${steps}`, down: (steps) => `下降 ${steps}`, stayed: "未移动",
    cameFrom: (rank) => `原第 ${rank} 位`, goesTo: (rank) => `移至第 ${rank} 位`, left: "移出列表",
    more: "展开", less: "收起",
    partial: "索引的一部分未能及时应答：结果不完整。",
    missingShards: (shards) => `缺少分片：${shards}。`,
    queryCut: "查询超过模型可读长度，末尾未被读取。",
    textsCut: "有文本超过模型可读长度，末尾未被读取。",
    rerankSkipped: "时间不足，未重排：结果按召回顺序排列。",
    rerankPart: (count) => `时间只够重排 ${count} 个候选，其余未重排。`,
    versionsDiffer: "两次应答之间索引已更新：两种顺序来自两个版本。",
    tryAgain: "重试", wait: (seconds) => `服务器请您在 ${seconds} 秒后重试。`,
    busy: "服务器繁忙。",
    unreachable: (reason) => `无法连接服务器（${reason}）。`,
    foreign: (status) => `HTTP ${status}：此应答并非来自搜索服务器。`,
    foreignType: (type) => `应答来自途中的代理或网关（${type}）：`,
    request: (id) => `请求 ${id}`,
  },
};

let language = preferredLanguage();
let words = WORDS[language];

// The language chosen before, else the first of the browser's that the page speaks.
function preferredLanguage() {
  let chosen = null;
  try { chosen = localStorage.getItem("language"); } catch { /* Storage may be forbidden. */ }
  const wanted = [chosen, ...navigator.languages].map((name) => String(name).slice(0, 2).toLowerCase());
  return wanted.find((name) => name in WORDS) ?? "en";
}

function chooseLanguage(name) {
  language = name;
  words = WORDS[name];
  try { localStorage.setItem("language", name); } catch { /* It is then asked for again at the next visit. */ }
}

function sayEverything() {
  document.documentElement.lang = words.locale;
  for (const node of document.querySelectorAll("[data-say]")) node.textContent = words[node.dataset.say];
  for (const node of document.querySelectorAll("[data-label]")) node.ariaLabel = words[node.dataset.label];
  for (const node of document.querySelectorAll("[data-hint]")) node.placeholder = words[node.dataset.hint];
  const other = language === "zh" ? "en" : "zh";
  at("language").textContent = LANGUAGES[other];
  at("language").lang = WORDS[other].locale;
}

const grouped = (number) => new Intl.NumberFormat(words.locale).format(number);
