"""The search page in Debian's Chromium, before a server that answers as ours does."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, ConsoleMessage, Error, Page, expect
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response

from tests.support.browser import IN_BROWSER, PHONE, WIDE
from tests.support.search_server import FIRST_NUMBER, SearchServer, make_collection, refusal, served

pytestmark = IN_BROWSER


Open = Callable[..., Page]


@pytest.fixture
def open_page(browser: Browser) -> Iterator[Open]:
    """Opens the page of a server. At the end of the test it must have written no error of script or policy."""
    wrong: list[str] = []

    def note(message: ConsoleMessage) -> None:
        # Chromium itself writes a line for each answer of status 400 and above.
        if message.type == "error" and not message.text.startswith("Failed to load resource"):
            wrong.append(message.text)

    with ExitStack() as stack:

        def open_one(server: SearchServer, address: str = "/", **context: Any) -> Page:
            if not server.url:
                stack.enter_context(served(server))
            opened = browser.new_context(**({"viewport": WIDE, "locale": "en-US"} | context))
            stack.callback(opened.close)
            page = opened.new_page()
            page.set_default_timeout(10_000)
            page.on("console", note)
            page.on("pageerror", lambda error: wrong.append(str(error)))
            page.on("request", lambda request: _same_origin(request.url, server, wrong))
            page.goto(server.url + address)
            return page

        yield open_one
    assert wrong == []


def _same_origin(url: str, server: SearchServer, wrong: list[str]) -> None:
    if not url.startswith((server.url, "data:")):
        wrong.append(f"asked for {url}")


def search(page: Page, query: str) -> None:
    page.get_by_role("searchbox").fill(query)
    page.keyboard.press("Enter")
    expect(page.locator("#status")).to_contain_text("index v000003")


def ids(page: Page) -> list[str]:
    return page.locator(".results .id").all_inner_texts()


# --- results --------------------------------------------------------------------------------------------------


def test_a_search_shows_scores_times_and_what_moved(open_page: Open) -> None:
    server = SearchServer()
    page = open_page(server)
    search(page, "insurance")
    expect(page.locator("#status")).to_have_text("10 results, reranked · 21.0 ms · index v000003")
    timings = page.locator("#timings").inner_text().split("\n")
    pairs = dict(zip(timings[::2], timings[1::2], strict=True))
    assert pairs == {
        "encode": "5.3 ms",
        "recall": "1.5 ms",
        "fetch": "0.8 ms",
        "rerank": "12.5 ms",
        "waiting and other": "1.0 ms",
    }
    first = page.locator(".results > li").first
    assert first.locator(".scores").inner_text().split() == [
        "recall",
        "0.8063",
        "rerank",
        "5.5000",
        "score",
        "2.3750",
    ]
    expect(first.locator(".badge")).to_have_text("↑3up 3, from 4")
    expect(page.locator("#about")).to_contain_text("Index v000003 · 27,413 rows · measured recall 0.9873")
    assert server.searches() == [
        {"query": "insurance", "k": 10, "mode": "dense", "rerank": True, "explain": True}
    ]


def test_highlights_are_the_words_of_the_query(open_page: Open) -> None:
    page = open_page(SearchServer())
    search(page, "how are POLICIES cancelled")
    assert page.locator(".results mark").all_inner_texts()[:3] == ["policy", "cancelled", "policies"]
    search(page, "汽车的保险怎么赔付")
    row = page.locator(".results > li", has_text="doc-2")
    assert row.locator("mark").all_inner_texts() == ["汽车保险", "赔付"]
    assert "租房" not in "".join(page.locator(".results mark").all_inner_texts())


@pytest.mark.parametrize(
    ("query", "text", "marked"),
    [
        ("cars", "A car, two cars and a cartoon", ["car", "cars"]),
        ("cancel a call", "cancelled calls; called processes", ["cancelled", "calls", "called"]),
        ("to be", "to be or not to be", ["to", "be", "to", "be"]),
        ("the car", "the car", ["car"]),
        ("猫", "一只猫。", ["猫"]),
        ("iPhone手机壳", "iphone 的手机壳", ["iphone", "手机壳"]),
        ("汽车保险", "汽车贷款与车险", ["汽车"]),
        ("ＡＢＣ", "abc", ["abc"]),
        ("𠮷野家", "在𠮷野家吃饭", ["𠮷野家"]),
        ("ประกัน", "ประกัน", ["ประกัน"]),
        ("?!", "what?!", []),
        ("a.*b (c", "a.*b (c", ["b", "c"]),
    ],
)
def test_marked_passages(any_page: Page, query: str, text: str, marked: list[str]) -> None:
    passages = any_page.evaluate(
        "([query, text]) => passagesOf(text, termsOf(query)).map(([a, b]) => text.slice(a, b))", [query, text]
    )
    assert passages == marked


@pytest.fixture(scope="module")
def any_page(browser: Browser) -> Iterator[Page]:
    """A page whose functions are asked directly."""
    with served(SearchServer()) as server:
        page = browser.new_page()
        page.goto(server.url)
        yield page
        page.context.close()


def test_texts_of_documents_are_texts(open_page: Open) -> None:
    page = open_page(SearchServer(), "/#q=%3Cimg%20src%3Dx%3E&k=12")
    pets = page.locator(".results > li", has_text="doc-11")
    expect(pets).to_contain_text("<b>Pets</b> & vets: <img src=x onerror=alert(1)> insurance")
    assert page.locator("#answer img, #answer b").count() == 0


def test_the_browser_itself_refuses_a_text_as_html(any_page: Page) -> None:
    with pytest.raises(Error, match="TrustedHTML"):
        any_page.evaluate("document.body.innerHTML = '<p>'")


def test_a_long_text_opens_by_its_button(open_page: Open) -> None:
    page = open_page(SearchServer(), "/#q=flood&k=12")
    flood = page.locator(".results > li", has_text="doc-10")
    button = flood.get_by_role("button", name="Show all")
    expect(button).to_have_attribute("aria-expanded", "false")
    cut = len(flood.locator(".text p").inner_text())
    button.click()
    expect(flood.get_by_role("button", name="Show less")).to_have_attribute("aria-expanded", "true")
    assert cut < 710
    assert len(flood.locator(".text p").inner_text()) > 1000


# --- exact numbers --------------------------------------------------------------------------------------------


def test_numbers_beyond_2_to_the_53_are_shown_as_stored(open_page: Open) -> None:
    server = SearchServer()
    page = open_page(server)
    search(page, "renters")
    shown = {word for word in page.inner_text("body").split() if word.startswith("90071992547")}
    rows = (3, 0, 1, 5, 2, 4, 6, 7, 8, 9)
    assert shown == {str(FIRST_NUMBER + 2 * row) for row in rows}


@pytest.mark.parametrize(
    "json_text",
    [
        '{"a": 9007199254740993, "b": [-18446744073709551615, 1]}',
        '{"a": 1000000000000000000000001}',
        '{"a": 0.12345678901234567891}',
        '{"a": 1e400, "b": -0}',
        r'{"a \" 9007199254740993": "9007199254740993 \\", "b": 9007199254740993}',
        '["1", 0.1, 100, null, true, {}]',
    ],
)
def test_json_keeps_its_digits(any_page: Page, json_text: str) -> None:
    assert any_page.evaluate("text => written(parseExactly(text))", json_text) == json_text


def test_numbers_that_fit_are_numbers(any_page: Page) -> None:
    text = "[9007199254740991, 1.0, 1e-07, 0.30000000000000004, -12.5, 1E5]"
    assert any_page.evaluate("text => parseExactly(text)", text) == json.loads(text)
    for broken in ("[9007199254740993", '["a', "[01]", "[NaN]", ""):
        with pytest.raises(Error, match="SyntaxError"):
            any_page.evaluate("text => parseExactly(text)", broken)


def test_a_condition_goes_out_with_its_digits(open_page: Open) -> None:
    server = SearchServer()
    page = open_page(server)
    search(page, "renters")
    page.get_by_text("Filter", exact=True).click()
    page.get_by_label("Column").select_option("doc_no")
    page.get_by_label("Comparison").select_option("$gte")
    assert page.locator("#values option").first.get_attribute("value") == str(FIRST_NUMBER + 6)
    page.get_by_label("Value").fill(str(FIRST_NUMBER))
    page.get_by_role("button", name="Add").click()
    expect(page.locator("summary")).to_have_text("Filter (set)")
    page.get_by_label("Comparison").select_option("$lt")
    page.get_by_label("Value").fill("9007199254741013")
    page.get_by_label("Value").press("Enter")
    page.get_by_label("Column").select_option("lang")
    page.get_by_label("Comparison").select_option("$in")
    page.get_by_label("Value").fill("en，zh")
    page.get_by_label("Value").press("Enter")
    wanted = '{"doc_no": {"$gte": 9007199254740993, "$lt": 9007199254741013}, "lang": {"$in": ["en", "zh"]}}'
    expect(page.get_by_label("Filter as JSON")).to_have_value(wanted)
    expect(page.locator("#answer")).to_have_attribute("aria-busy", "false")
    assert server.asked[-1].raw.endswith(f',"filter":{wanted}}}')
    page.get_by_role("button", name="Clear").click()
    expect(page.locator("#answer")).to_have_attribute("aria-busy", "false")
    expect(page.get_by_label("Filter as JSON")).to_have_value("")
    assert "filter" not in server.searches()[-1]


@pytest.mark.parametrize(
    ("before", "column", "operator", "literal", "after"),
    [
        ("{}", "a", "$eq", "1", '{"a": 1}'),
        ('{"a": 1}', "b", "$ne", '"x"', '{"a": 1, "b": {"$ne": "x"}}'),
        ('{"a": 1}', "a", "$eq", "2", '{"$and": [{"a": 1}, {"a": 2}]}'),
        ('{"a": {"$gt": 1}}', "a", "$gt", "2", '{"$and": [{"a": {"$gt": 1}}, {"a": {"$gt": 2}}]}'),
        (
            '{"a": 9007199254740993}',
            "a",
            "$lt",
            "2",
            '{"$and": [{"a": 9007199254740993}, {"a": {"$lt": 2}}]}',
        ),
    ],
)
def test_conditions_are_joined(
    any_page: Page, before: str, column: str, operator: str, literal: str, after: str
) -> None:
    join = "([f, c, o, l]) => written(joined(parseExactly(f), c, o, parseExactly(l)))"
    assert any_page.evaluate(join, [before, column, operator, literal]) == after


@pytest.mark.parametrize(
    ("typed", "type", "literal"),
    [
        ("9007199254740993", "uint64", "9007199254740993"),
        ("-1.50", "decimal128(10, 2)", "-1.5"),
        ("5", "list<item: int64>", "5"),
        ("5", "list<element: string not null>", '"5"'),
        ("5", "string", '"5"'),
        ("true", "bool", "true"),
        ("2024-01-31", "date32[day]", '"2024-01-31"'),
        ("1e3", "double", "1000"),
    ],
)
def test_a_typed_value_takes_its_columns_type(any_page: Page, typed: str, type: str, literal: str) -> None:
    assert any_page.evaluate("([typed, type]) => written(literalOf(typed, type))", [typed, type]) == literal


@pytest.mark.parametrize(
    ("typed", "type"), [("", "int64"), ("1,5", "double"), ("0x1", "int8"), ("yes", "bool")]
)
def test_a_value_of_another_type_is_refused(any_page: Page, typed: str, type: str) -> None:
    with pytest.raises(Error, match="This column holds"):
        any_page.evaluate("([typed, type]) => literalOf(typed, type)", [typed, type])


def test_a_wrong_filter_is_not_sent(open_page: Open) -> None:
    server = SearchServer()
    page = open_page(server, "/#q=car&filter=%5B1%5D")
    expect(page.get_by_label("Filter as JSON")).to_be_visible()
    expect(page.locator("#about")).to_contain_text("v000003")
    page.get_by_role("searchbox").press("Enter")
    assert page.locator("#filter").evaluate("node => node.validationMessage").startswith("The filter must be")
    page.get_by_label("Value").fill("many")
    page.get_by_label("Filter as JSON").fill("")
    page.get_by_role("button", name="Add").click()
    assert page.locator("#value").evaluate("node => node.validationMessage") == "This column holds numbers"
    assert server.searches() == []


# --- one question after another -------------------------------------------------------------------------------


def test_a_second_search_wins_over_the_first(open_page: Open) -> None:
    server = SearchServer(delays_s={"car": 1.0})
    page = open_page(server)
    box = page.get_by_role("searchbox")
    box.fill("car")
    box.press("Enter")
    expect(page.locator("#status")).to_have_text("Searching …")
    box.press_sequentially(" insurance for a collision")
    box.press("Enter")
    expect(page.locator("#status")).to_contain_text("10 results")
    page.wait_for_timeout(1200)
    assert [body["query"] for body in server.searches()] == ["car", "car insurance for a collision"]
    assert "collision" in page.locator(".results mark").all_inner_texts()
    assert "q=car+insurance+for+a+collision" in page.url


def test_a_link_opened_in_the_open_tab_is_searched(open_page: Open) -> None:
    server = SearchServer()
    page = open_page(server, "/#q=first&k=3&rerank=false")
    expect(page.locator("#status")).to_have_text("3 results · 8.0 ms · index v000003")
    page.evaluate("location.hash = '#q=second&k=2&mode=lexical'")
    expect(page.locator("#status")).to_contain_text("2 results, reranked")
    expect(page.get_by_role("searchbox")).to_have_value("second")
    expect(page.get_by_label("Mode")).to_have_value("lexical")
    search(page, "third")
    page.go_back()
    expect(page.get_by_role("searchbox")).to_have_value("second")
    page.go_back()
    expect(page.get_by_role("searchbox")).to_have_value("first")
    expect(page.locator("#status")).to_contain_text("3 results")
    expect(page.get_by_label("Rerank")).not_to_be_checked()
    asked = [(body["query"], body["k"], body["mode"]) for body in server.searches()]
    second = ("second", 2, "lexical")
    assert asked == [
        ("first", 3, "dense"),
        second,
        ("third", 2, "lexical"),
        second,
        ("first", 3, "dense"),
    ]


@pytest.mark.parametrize(
    "address", ["/raytower", "/raytower/", "/raytower/#q=car", "/raytower?from=portal#q=car"]
)
def test_below_a_prefix(open_page: Open, address: str) -> None:
    server = SearchServer(prefix="/raytower")
    page = open_page(server, address)
    expect(page.locator("#about")).to_contain_text("v000003")
    search(page, "car")
    assert {asked.path for asked in server.asked} == {"/raytower/v1/collections", "/raytower/v1/search"}


def test_an_address_that_starts_with_two_slashes_is_no_other_host(open_page: Open) -> None:
    page = open_page(SearchServer(prefix="//other"), "//other")
    expect(page.locator("#about")).to_contain_text("v000003")


# --- what the collection offers -------------------------------------------------------------------------------


def test_only_the_controls_that_do_something(open_page: Open) -> None:
    plain = make_collection(reranker=None, modes=["dense"], classifier=None, classify_modes=[], columns={})
    server = SearchServer(collections=[plain])
    server.change = {"reranked": False}
    page = open_page(server)
    search(page, "car")
    expect(page.locator("#status")).to_have_text("10 results · 8.0 ms · index v000003")
    for hidden in ("#rerank", "#compare", "#mode", "#collection", "#condition", "#to-classify"):
        expect(page.locator(hidden)).to_be_hidden()
    expect(page.locator("#about")).to_contain_text("no reranker")
    assert page.locator(".results .badge").count() == 0
    assert page.locator("#notices p").count() == 0
    assert server.searches() == [{"query": "car", "k": 10, "rerank": False}]


def test_a_collection_is_chosen(open_page: Open) -> None:
    other = make_collection("法律 2", default=False, rows=12, modes=["dense"], reranker=None, recall=None)
    server = SearchServer(collections=[other, make_collection()])
    page = open_page(server)
    search(page, "car")
    assert server.asked[-1].path == "/v1/insurance/search"
    page.get_by_label("Collection").select_option("法律 2")
    expect(page.locator("#about")).to_contain_text("12 rows · recall not measured")
    expect(page.locator("#rerank")).to_be_hidden()
    expect(page.locator("#status")).to_contain_text("10 results")
    assert server.asked[-1].path == "/v1/法律 2/search"
    again = open_page(server, page.url.removeprefix(server.url))
    expect(again.get_by_label("Collection")).to_have_value("法律 2")
    expect(again.locator("#status")).to_contain_text("10 results")
    assert server.asked[-1].path == "/v1/法律 2/search"


def test_tools_ask_the_chosen_collection(open_page: Open) -> None:
    other = make_collection("other", default=False, classify_modes=[])
    server = SearchServer(collections=[make_collection(), other])
    page = open_page(server, "/#tool=similarity&a=car&b=bus&collection=other")
    expect(page.locator("#status")).to_contain_text("0.8125")
    assert server.asked[-1].path == "/v1/other/similarity"
    page.get_by_label("Collection").select_option("insurance")
    page.get_by_role("button", name="Classification").click()
    page.get_by_label("Text", exact=True).fill("car")
    page.locator("#classify button").click()
    expect(page.locator(".labels li")).to_have_count(2)
    assert server.asked[-1].path == "/v1/insurance/classify"
    page.get_by_label("Collection").select_option("other")
    expect(page.get_by_role("searchbox")).to_be_visible()


def test_a_server_that_lists_no_collections_is_searched(open_page: Open) -> None:
    server = SearchServer(
        instead=lambda request: refusal(404, "no such route") if request.method == "GET" else None
    )
    page = open_page(server)
    search(page, "car")
    assert server.searches() == [{"query": "car", "k": 10}]
    expect(page.locator("#rerank")).to_be_hidden()
    expect(page.locator("#error")).to_be_hidden()


def test_a_new_index_version_is_described(open_page: Open) -> None:
    server = SearchServer(collections=[make_collection(index_version="v000002", rows=7)])
    page = open_page(server)
    expect(page.locator("#about")).to_contain_text("v000002 · 7 rows")
    server.collections = [make_collection()]
    search(page, "car")
    expect(page.locator("#about")).to_contain_text("v000003 · 27,413 rows")


def test_side_by_side_shows_where_each_hit_went(open_page: Open) -> None:
    server = SearchServer()
    page = open_page(server, "/#q=car&k=3")
    expect(page.locator("#status")).to_contain_text("3 results")
    page.get_by_label("Side by side").check()
    columns = page.locator(".columns section")
    expect(columns).to_have_count(2)
    before, after = columns.all()
    expect(before.locator("h2")).to_have_text("Order of recall")
    assert before.locator(".id").all_inner_texts() == ["doc-0", "doc-1", "doc-2"]
    expect(before.locator(".badge .for-readers")).to_have_text(["to 2", "to 3", "left the list"])
    assert after.locator(".id").all_inner_texts() == ["doc-3", "doc-0", "doc-1"]
    expect(after.locator(".badge .for-readers")).to_have_text(
        ["up 3, from 4", "down 1, from 1", "down 1, from 2"]
    )
    assert [body["rerank"] for body in server.searches()[1:]] == [True, False]
    assert "view=compare" in page.url
    page.get_by_label("Rerank", exact=True).uncheck()
    expect(page.locator(".columns")).to_have_count(0)


def test_similarity_and_classification(open_page: Open) -> None:
    server = SearchServer()
    page = open_page(server)
    page.get_by_role("button", name="Similarity").click()
    page.get_by_label("First text").fill("car")
    page.get_by_label("Second text").fill("bus")
    page.get_by_role("button", name="Compare").click()
    expect(page.locator("#status")).to_have_text("Cosine similarity: 0.8125")
    assert server.asked[-1].body == {"pairs": [["car", "bus"]]}
    server.instead = lambda request: JSONResponse(
        {"scores": [0.5], "model": "m", "usage": {"prompt_tokens": 2, "total_tokens": 2, "truncated": 1}}
    )
    page.get_by_role("button", name="Compare").click()
    expect(page.locator("#notices")).to_contain_text("A text was longer than the model reads")

    server.instead = lambda request: None
    page.get_by_role("button", name="Classification").click()
    expect(page.locator("#notices")).to_have_text("")
    page.get_by_label("Text", exact=True).fill("a sofa")
    page.locator("#way").select_option("votes")
    page.locator("#classify button").click()
    expect(page.locator(".labels li").first).to_have_text("home › renters0.7500")
    assert server.asked[-1].body == {"texts": ["a sofa"], "top_k": 5, "mode": "votes"}
    again = open_page(server, page.url.removeprefix(server.url))
    expect(again.locator(".labels li")).to_have_count(2)


# --- what goes wrong is said ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"partial": True, "missing_shards": [3, 5]},
            "A part of the index did not answer in time: these results are incomplete. Missing shards: 3, 5.",
        ),
        ({"usage": {"truncated": 1}}, "The query was longer than the model reads; its end was not read."),
        ({"reranked": False, "reranked_k": 0}, "Not reranked: the time did not suffice."),
    ],
)
def test_what_an_answer_lacks_is_said(open_page: Open, change: dict[str, Any], said: str) -> None:
    page = open_page(SearchServer(change=change), "/#q=car")
    expect(page.locator("#notices")).to_contain_text(said)


def test_candidates_that_were_not_reranked_are_counted(open_page: Open) -> None:
    hits = [
        {"id": "a", "text": "x", "metadata": {}, "recall_score": 1, "rerank_score": 2, "score": 2, "rank": 1},
        {
            "id": "b",
            "text": None,
            "metadata": None,
            "recall_score": 1,
            "rerank_score": None,
            "score": 1,
            "rank": 2,
        },
    ]
    page = open_page(SearchServer(change={"results": [hits], "reranked_k": 1}), "/#q=car")
    expect(page.locator("#notices")).to_contain_text("The time sufficed for 1 candidates")
    expect(page.locator(".results > li").nth(1).locator(".scores")).to_contain_text("–")


def test_nothing_found_is_said(open_page: Open) -> None:
    page = open_page(SearchServer(change={"results": [[]]}), "/#q=car&filter=%7B%7D")
    expect(page.locator("#status")).to_contain_text("No document that passes the filter was found.")


def _gateway(request: Request) -> Response | None:
    html = "<html><head><title>502 Bad Gateway</title></head><body><h1>nginx</h1></body></html>"
    return HTMLResponse(html, status_code=502) if request.method == "POST" else None


def _kong(request: Request) -> Response | None:
    return (
        JSONResponse({"message": "no Route matched"}, status_code=404) if request.method == "POST" else None
    )


def _portal(request: Request) -> Response | None:
    return HTMLResponse("<p>Please sign in</p>") if request.method == "POST" else None


@pytest.mark.parametrize(
    ("instead", "lines"),
    [
        (
            _gateway,
            ["HTTP 502 Bad Gateway: the answer is not the search server's.", "text/html", "502 Bad Gateway"],
        ),
        (
            _kong,
            [
                "HTTP 404 Not Found: the answer is not the search server's.",
                "application/json",
                "no Route matched",
            ],
        ),
        (_portal, ["HTTP 200 OK: the answer is not the search server's.", "text/html", "Please sign in"]),
    ],
)
def test_an_answer_of_a_gateway_is_named_as_such(
    open_page: Open, instead: Callable[[Request], Response | None], lines: list[str]
) -> None:
    page = open_page(SearchServer(instead=instead), "/#q=car")
    shown = page.locator("#error p")
    expect(shown).to_have_count(3)
    for line, wanted in zip(shown.all_inner_texts(), lines, strict=True):
        assert wanted in line
    expect(page.locator("#status")).to_have_text("")


def test_a_busy_server_says_when_to_come_again(open_page: Open) -> None:
    server = SearchServer()
    server.instead = lambda request: (
        refusal(429, "12 requests wait", Retry_After="7", X_Request_Id="r-1")
        if request.method == "POST"
        else None
    )
    page = open_page(server, "/#q=car")
    expect(page.locator("#error p")).to_have_text(
        ["The server is busy.", "12 requests wait", "The server asks to try again in 7 s.", "Request r-1"]
    )
    server.instead = lambda request: None
    page.get_by_role("button", name="Try again").click()
    expect(page.locator("#status")).to_contain_text("10 results")
    expect(page.locator("#error")).to_be_hidden()


def test_the_wait_may_be_a_date(any_page: Page) -> None:
    for header, seconds in (
        ("7", 7),
        ("Wed, 21 Oct 2015 07:28:00 GMT", 0),
        ("soon", None),
        (None, None),
    ):
        assert any_page.evaluate("secondsToWait", header) == seconds
    hour = "secondsToWait(new Date(Date.now() + 3600e3).toUTCString())"
    assert 3590 <= any_page.evaluate(hour) <= 3600


def test_the_servers_own_refusal_is_shown(open_page: Open) -> None:
    server = SearchServer()
    server.instead = lambda request: refusal(422, "k: is 5000") if request.method == "POST" else None
    page = open_page(server, "/#q=car")
    expect(page.locator("#error p")).to_have_text(["k: is 5000"])
    assert page.get_by_role("button", name="Try again").count() == 0


def test_a_server_that_is_gone_is_said(open_page: Open, browser: Browser) -> None:
    page = open_page(SearchServer())
    page.route("**/v1/search", lambda route: route.abort())
    page.get_by_role("searchbox").fill("car")
    page.get_by_role("searchbox").press("Enter")
    expect(page.locator("#error p").first).to_contain_text("The server cannot be reached")


def test_a_key_is_asked_for(open_page: Open) -> None:
    server = SearchServer(key="s3cret")
    page = open_page(server, "/#q=car")
    expect(page.locator("#error p").first).to_have_text("The server asks for an API key.")
    key = page.get_by_label("API key")
    expect(key).to_be_focused()
    key.fill("schlüssel")
    key.press("Enter")
    expect(page.locator("#error")).to_contain_text("no letters beyond ASCII")
    key.fill("wrong")
    key.press("Enter")
    expect(page.locator("#error")).to_contain_text("missing or wrong API key")
    key.fill(" s3cret ")
    key.press("Enter")
    expect(page.locator("#status")).to_contain_text("10 results, reranked")
    expect(page.locator("#key-form")).to_be_hidden()
    assert "s3cret" not in page.url
    assert page.evaluate("JSON.stringify([localStorage, sessionStorage])") == "[{},{}]"


def test_a_key_is_asked_for_before_the_first_query(open_page: Open) -> None:
    page = open_page(SearchServer(key="s3cret"))
    page.get_by_label("API key").fill("s3cret")
    page.get_by_label("API key").press("Enter")
    expect(page.locator("#about")).to_contain_text("v000003")
    expect(page.locator("#key-form")).to_be_hidden()
    expect(page.locator("#error")).to_be_hidden()


# --- languages, keys, screens ---------------------------------------------------------------------------------


def test_the_language_is_the_browsers_and_can_be_switched(open_page: Open) -> None:
    page = open_page(SearchServer(), "/#q=汽车保险", locale="zh-CN")
    expect(page.locator("#status")).to_have_text("10 条结果，已重排 · 21.0 毫秒 · 索引 v000003")
    expect(page.locator("html")).to_have_attribute("lang", "zh-CN")
    page.get_by_role("button", name="English").click()
    expect(page.locator("#status")).to_have_text("10 results, reranked · 21.0 ms · index v000003")
    expect(page.locator("html")).to_have_attribute("lang", "en")
    page.reload()
    expect(page.get_by_role("button", name="中文")).to_be_visible()


def test_every_word_is_there_in_both_languages(any_page: Page) -> None:
    shapes = any_page.evaluate(
        """() => Object.values(WORDS).map((words) => JSON.stringify(words, (name, value) =>
             typeof value === "function" ? "function" : typeof value === "string" ? "string" : value))"""
    )
    assert shapes[0] == shapes[1]
    used = any_page.evaluate(
        """() => Array.from(document.querySelectorAll("[data-say], [data-label], [data-hint]"), (node) =>
             words[node.dataset.say ?? node.dataset.label ?? node.dataset.hint])"""
    )
    assert all(used)


def test_everything_by_keyboard(open_page: Open) -> None:
    server = SearchServer()
    page = open_page(server)
    keys = page.keyboard
    expect(page.get_by_role("searchbox")).to_be_focused()
    keys.type("flood")
    keys.press("Enter")
    expect(page.locator("#status")).to_contain_text("10 results, reranked")

    def go_to(selector: str, most: int = 30) -> None:
        for _ in range(most):
            if page.evaluate("selector => document.activeElement.matches(selector)", selector):
                outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
                assert outline == "solid", f"{selector} does not show that it has the focus"
                return
            keys.press("Tab")
        raise AssertionError(f"{selector} cannot be reached")

    go_to("#mode")
    keys.press("ArrowDown")
    expect(page.locator("#mode")).to_have_value("lexical")
    go_to("#rerank")
    keys.press("Space")
    expect(page.locator("#status")).to_have_text("10 results · 8.0 ms · index v000003")
    go_to("#compare")
    keys.press("Space")
    expect(page.locator(".columns section")).to_have_count(2)
    go_to("summary")
    keys.press("Enter")
    go_to("#filter")
    keys.type('{"year": 2003}')
    keys.press("Enter")
    expect(page.locator("#answer")).to_have_attribute("aria-busy", "false")
    assert server.searches()[-1]["filter"] == {"year": 2003}
    page.locator("body").click(position={"x": 2, "y": 2})
    keys.press("/")
    expect(page.get_by_role("searchbox")).to_be_focused()
    keys.press("Shift+Tab")
    keys.press("Shift+Tab")
    go_to("#to-similarity", 1)
    keys.press("Enter")
    expect(page.get_by_label("First text")).to_be_focused()


@pytest.mark.parametrize(("locale", "screen", "scheme"), [("en-US", WIDE, "light"), ("zh-CN", PHONE, "dark")])
def test_no_barrier_that_axe_finds(open_page: Open, locale: str, screen: dict[str, int], scheme: str) -> None:
    server = SearchServer(
        collections=[make_collection(), make_collection("other", default=False)],
        change={"partial": True, "missing_shards": [1]},
    )
    context = {"color_scheme": scheme, "locale": locale, "viewport": screen}
    addresses = {
        "/#q=insurance+汽车保险&k=4&filter=%7B%7D": ".results mark",
        "/#q=insurance&k=12&view=compare": ".columns",
        "/#tool=similarity&a=car&b=bus": "meter",
        "/#tool=classify&text=car": ".labels",
    }
    page = open_page(server, **context)
    for address, ready in addresses.items():
        page.goto(server.url + address)
        expect(page.locator(ready).first).to_be_visible()
        _check_barriers(page, address)
    server.key = "s3cret"
    page.reload()
    expect(page.locator("#key")).to_be_visible()
    _check_barriers(page, "asked for a key")


def _check_barriers(page: Page, where: str) -> None:
    found = Axe().run(page, options={"resultTypes": ["violations", "incomplete"]})
    barriers = [
        f"{where}: {one['impact']} {one['id']} {node['target']} {node['failureSummary']}"
        for one in found.response["violations"]
        for node in one["nodes"]
    ]
    assert barriers == []


@pytest.mark.parametrize(
    "address", ["/", "/#q=insurance&k=12&view=compare&filter=%7B%7D", "/#tool=classify&text=car"]
)
def test_a_phone_needs_no_scrolling_sideways(open_page: Open, address: str) -> None:
    server = SearchServer(
        collections=[make_collection(), make_collection("a-collection-with-a-name-" * 4, default=False)]
    )
    page = open_page(server, address, viewport=PHONE, has_touch=True, is_mobile=True)
    expect(page.locator("#about")).to_contain_text("v000003")
    if "#" in address:
        expect(page.locator("#answer > *").first).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth") == PHONE["width"]


def test_dark_where_the_system_is(open_page: Open) -> None:
    server = SearchServer()
    colours = {
        scheme: open_page(server, color_scheme=scheme).evaluate(
            "[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color]"
        )
        for scheme in ("light", "dark")
    }
    assert colours == {
        "light": ["rgb(247, 247, 245)", "rgb(29, 31, 35)"],
        "dark": ["rgb(21, 23, 26)", "rgb(231, 232, 234)"],
    }
