// The filter: JSON text, which the row of column, comparison and value adds to.

// The filter as the person wrote it, or "" for none. Throws where it is not a JSON object.
function filterText() {
  const text = at("filter").value.trim();
  if (!text) return "";
  const value = JSON.parse(text);
  if (value === null || typeof value !== "object" || Array.isArray(value)) throw new SyntaxError();
  return text;
}

function checkFilter() {
  let wrong = "";
  try { filterText(); } catch { wrong = words.badFilter; }
  at("filter").setCustomValidity(wrong);
  if (wrong) at("filter-box").open = true;
}

function showFilterState() {
  at("filter-box").querySelector("summary").textContent = at("filter").value.trim() ? words.filterSet : words.filter;
}

const NUMBERS = /^(?:u?int|float|double|halffloat|decimal)/;

// What the person typed for a column, as a member of a filter. `type` is Arrow's name of the column's type.
function literalOf(typed, type) {
  const member = /^(?:large_)?list<(?:\w+: )?(.*?)(?: not null)?>$/.exec(type)?.[1] ?? type;
  if (NUMBERS.test(member)) {
    if (!JSON_NUMBER.test(typed)) throw new SyntaxError(words.badNumber);
    return parseExactly(typed);
  }
  if (member === "bool") {
    if (!/^(?:true|false)$/.test(typed)) throw new SyntaxError(words.badBoolean);
    return typed === "true";
  }
  return typed;
}

// {"year": {"$gte": 2000}} and year $lt 2010 → {"year": {"$gte": 2000, "$lt": 2010}}
function joined(filter, column, operator, literal) {
  const asked = operator === "$eq" ? literal : { [operator]: literal };
  const before = Object.hasOwn(filter, column) ? filter[column] : undefined;
  if (before === undefined) return { ...filter, [column]: asked };
  const isComparison = (value) =>
    value !== null && typeof value === "object" && !Array.isArray(value) && !(value instanceof Digits);
  if (isComparison(before) && isComparison(asked) && !Object.hasOwn(before, operator))
    return { ...filter, [column]: { ...before, ...asked } };
  return { $and: [filter, { [column]: asked }] };
}

function addCondition() {
  const typed = at("value").value.trim();
  const column = at("column").value, operator = at("operator").value;
  const type = String(collection()?.columns?.[column] ?? "");
  at("value").setCustomValidity("");
  checkFilter();
  if (!at("filter").reportValidity()) return;
  try {
    const literal = operator === "$in"
      ? typed.split(/[,，]/).map((one) => literalOf(one.trim(), type)) : literalOf(typed, type);
    const before = parseExactly(filterText() || "{}");
    at("filter").value = written(joined(before, column, operator, literal));
  } catch (error) {
    at("value").setCustomValidity(error.message);
    at("value").reportValidity();
    return;
  }
  at("value").value = "";
  filterChanged();
}

function filterChanged() {
  showFilterState();
  if (at("query").value.trim()) at("search").requestSubmit();
}

// Values of the chosen column in the results are offered.
function offerValues(hits) {
  const column = at("column").value;
  const values = new Set(hits.map((hit) => hit.metadata?.[column]).filter((value) => value !== null && typeof value !== "undefined")
    .map(asShown).filter((value) => value.length < 80));
  at("values").replaceChildren(...Array.from(values, (value) => new Option(value, value)));
}
