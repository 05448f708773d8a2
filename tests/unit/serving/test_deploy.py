"""What lies in deploy/, as far as it can be read without containers: dashboards, alerts, compose file, Dockerfiles."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.metric_names import known_series

ROOT = Path(__file__).resolve().parents[3]
DEPLOY = ROOT / "deploy"
DASHBOARD = json.loads((DEPLOY / "grafana" / "dashboards" / "raytower.json").read_text(encoding="utf-8"))
ALERTS = yaml.safe_load((DEPLOY / "alerts.yml").read_text(encoding="utf-8"))
COMPOSE = yaml.safe_load((DEPLOY / "compose.yaml").read_text(encoding="utf-8"))
SERIES = known_series()
# Labels that Prometheus itself puts on what it scrapes.
SCRAPED = {"job", "instance"}


def dashboard_queries() -> list[tuple[str, str]]:
    queries = [
        (panel["title"], target["expr"])
        for panel in DASHBOARD["panels"]
        for target in panel.get("targets", ())
    ]
    variables = [(item["name"], item["query"]["query"]) for item in DASHBOARD["templating"]["list"]]
    return queries + variables


def alert_queries() -> list[tuple[str, str]]:
    return [(rule["alert"], rule["expr"]) for group in ALERTS["groups"] for rule in group["rules"]]


def problems(query: str) -> list[str]:
    """Series and labels of a query that no server has. `up` is Prometheus' own."""
    found = []
    names = set(re.findall(r"\b(?:raytower|process)_\w+", re.sub(r'"[^"]*"', '""', query)))
    labels = set().union(*(SERIES.get(name, set()) for name in names)) | SCRAPED
    found += [f"no series {name}" for name in sorted(names) if name not in SERIES]
    for name, matchers in re.findall(r"\b((?:raytower|process)_\w+)\{([^}]*)\}", query):
        used = re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", matchers)
        found += [
            f"{name} has no label {label}" for label in used if label not in SERIES.get(name, set()) | SCRAPED
        ]
    for clause in re.findall(r"\b(?:by|without|on|ignoring)\s*\(([^)]*)\)", query):
        used = re.findall(r"\w+", clause)
        found += [f"no label {label}" for label in used if label not in labels]
    if "histogram_quantile" in query and not re.search(r"by \((?:\w+, )*le\b", query):
        found.append("a quantile needs le")
    # A counter that is not turned into a rate only ever grows.
    rest = re.sub(r"rate\(\w+(?:\{[^}]*\})?\[[^\]]*\]\)|label_values\([^)]*\)", "", query)
    counters = re.findall(r"\b(?:raytower|process)_\w+_(?:total|bucket|sum|count)\b", rest)
    found += [f"{name} without rate()" for name in counters if name in SERIES]
    return found


@pytest.mark.parametrize(("title", "query"), dashboard_queries() + alert_queries())
def test_queries_ask_for_what_a_server_has(title: str, query: str) -> None:
    assert problems(query) == []
    assert query.count("(") == query.count(")")
    variables = {item["name"] for item in DASHBOARD["templating"]["list"]} | {"__rate_interval"}
    assert set(re.findall(r"\$(\w+)", query)) <= variables


@pytest.mark.parametrize(
    ("query", "problem"),
    [
        ("rate(raytower_request_total[5m])", "no series raytower_request_total"),
        ('rate(raytower_requests_total{code="5"}[5m])', "raytower_requests_total has no label code"),
        ("sum by (lane) (rate(raytower_requests_total[5m]))", "no label lane"),
        ("sum(raytower_requests_total)", "raytower_requests_total without rate()"),
        (
            "histogram_quantile(0.9, sum by (stage) (rate(raytower_stage_seconds_bucket[5m])))",
            "a quantile needs le",
        ),
    ],
)
def test_a_wrong_query_is_found(query: str, problem: str) -> None:
    assert problems(query) == [problem]


def test_every_series_is_looked_at_somewhere() -> None:
    asked = " ".join(query for _, query in dashboard_queries())
    for name in SERIES:
        family = re.sub(r"_(bucket|sum|count)$", "", name)
        if name.startswith("raytower_"):
            assert family in asked, name


def test_the_guide_names_every_series() -> None:
    text = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`(raytower_\w+)`", text)) | {"raytower_forward_rows", "raytower_forward_tokens"}
    families = {re.sub(r"_(bucket|sum|count)$", "", name) for name in SERIES if name.startswith("raytower_")}
    assert named == families


def test_panels_do_not_lie_on_each_other() -> None:
    seen: set[tuple[int, int]] = set()
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
    for panel in DASHBOARD["panels"]:
        grid = panel["gridPos"]
        assert grid["x"] + grid["w"] <= 24
        cells = {(grid["x"] + x, grid["y"] + y) for x in range(grid["w"]) for y in range(grid["h"])}
        assert not seen & cells, panel["title"]
        seen |= cells
        assert panel["type"] == "row" or panel["datasource"]["uid"] == "prometheus"


# --- containers -----------------------------------------------------------------------------------------------


def instructions(path: Path) -> list[tuple[str, str]]:
    text = re.sub(r"^\s*#.*\n", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    lines = re.sub(r"\\\n\s*", "", text).splitlines()
    return [(line.split(None, 1)[0], line.split(None, 1)[1]) for line in lines if line.strip()]


@pytest.mark.parametrize("name", ["Dockerfile.cpu", "Dockerfile.gpu"])
def test_dockerfiles(name: str) -> None:
    steps = instructions(DEPLOY / name)
    known = {"FROM", "ARG", "ENV", "RUN", "WORKDIR", "COPY", "USER", "EXPOSE", "STOPSIGNAL", "HEALTHCHECK"}
    assert {step for step, _ in steps} <= known | {"ENTRYPOINT", "CMD"}
    final = steps[[step for step, _ in steps].index("FROM", 1) :]
    by_name = dict(final)
    user = by_name["USER"]
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", user), "a number that is not root's"
    assert [step for step, _ in final].index("USER") > max(
        i for i, (step, _) in enumerate(final) if step == "RUN"
    )
    assert "/readyz" in by_name["HEALTHCHECK"]
    probe = json.loads(by_name["HEALTHCHECK"].partition("CMD ")[2])
    compile(probe[-1], "HEALTHCHECK", "exec")
    assert json.loads(by_name["ENTRYPOINT"]) == ["raytower"]
    assert json.loads(by_name["CMD"])[0] == "serve"
    for _, words in steps:
        assert not re.search(r"(?i)\b(password|secret|token|api_?key)\b\s*=", words)
    for step, words in steps:
        if step == "COPY" and not words.startswith("--from"):
            *sources, _ = shlex.split(words)
            ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
            for source in sources:
                assert (ROOT / source).exists(), source
                assert f"!{source.removeprefix('./')}" in ignored, source
    extras = re.search(r'"\.\[([\w,]+)\]"', " ".join(words for step, words in steps if step == "RUN"))
    assert extras is not None
    declared = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert all(re.search(rf"^{extra} = \[", declared, re.MULTILINE) for extra in extras[1].split(","))
    # What a node of a Ray cluster needs beside a server, and what KubeRay's probes and login shells do.
    assert {"train", "serve"} <= set(extras[1].split(","))
    final_text = " ".join(words for _, words in final)
    assert "install -y --no-install-recommends wget" in final_text
    assert "'export PATH=/opt/raytower/bin:$PATH' > /etc/profile.d/raytower.sh" in final_text


def test_nothing_but_what_is_named_goes_to_the_builder() -> None:
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if not line.startswith("#")]
    assert lines[0] == "*"


def test_the_compose_file_names_files_that_are_there_and_secrets_that_are_not() -> None:
    services: dict[str, Any] = COMPOSE["services"]
    assert set(services) == {"raytower", "prometheus", "grafana"}
    declared = set(COMPOSE["secrets"])
    for name, service in services.items():
        assert set(service.get("secrets", ())) <= declared, name
        for port in service["ports"]:
            assert port.startswith("127.0.0.1:"), "only a reverse proxy faces the network"
        for volume in service["volumes"]:
            source = re.sub(r"\$\{[^}]*\}", "", volume).split(":")[0]
            assert not source.startswith("./") or (DEPLOY / source).exists(), volume
            assert source.startswith("./") or source == "" or source in COMPOSE["volumes"], volume
    assert (DEPLOY / services["raytower"]["build"]["dockerfile"].removeprefix("deploy/")).is_file()
    ignored = (ROOT / ".gitignore").read_text().splitlines()
    for secret in COMPOSE["secrets"].values():
        assert secret["file"].startswith("./secrets/")
    assert "deploy/secrets/" in ignored


def test_prometheus_scrapes_the_service_with_its_key() -> None:
    config = yaml.safe_load((DEPLOY / "prometheus.yml").read_text(encoding="utf-8"))
    (job,) = config["scrape_configs"]
    host, _, port = job["static_configs"][0]["targets"][0].partition(":")
    assert host in COMPOSE["services"]
    assert COMPOSE["services"][host]["ports"] == [f"127.0.0.1:{port}:{port}"]
    secret = job["authorization"]["credentials_file"].removeprefix("/run/secrets/")
    assert secret in COMPOSE["services"]["prometheus"]["secrets"]
    for name in config["rule_files"]:
        assert (DEPLOY / name).is_file()
    source = yaml.safe_load((DEPLOY / "grafana/provisioning/datasources/prometheus.yaml").read_text())
    assert source["datasources"][0]["uid"] == "prometheus"
    assert source["datasources"][0]["url"] == "http://prometheus:9090"
    provider = yaml.safe_load((DEPLOY / "grafana/provisioning/dashboards/raytower.yaml").read_text())
    mounted = provider["providers"][0]["options"]["path"]
    assert any(f":{mounted}:" in volume for volume in COMPOSE["services"]["grafana"]["volumes"])


def test_the_containers_config_is_one_that_serve_takes() -> None:
    from raytower.config import load_config
    from raytower.serving.config import ServeConfig

    load_config(ServeConfig, DEPLOY / "serve.yaml")
