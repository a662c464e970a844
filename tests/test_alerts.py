"""The alerts and the dashboard of a service: each alert fires when it must, and only then; each panel has data."""

import json
import re
import shutil
import subprocess
import time
import urllib.request
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from types import MappingProxyType
from typing import Any
from urllib.parse import urlencode

import pytest

from harness.scene import Scene, wait_until
from harness.servers import ServerMissing, skip_without_server
from harness.servers.local import ServerProcess, free_ports
from harness.servers.sqlite import SqliteFile
from support.rendered import CHOICES, QUESTIONS, TEMPLATE, Render, parse_yaml, run
from tools import reference
from tools.dashboard import drawn

FOLDER = "deploy/prometheus"
OPTIONAL = "NoMessages"
"""This rule is in a comment of the file."""


def rules_of(text: str) -> list[dict[str, Any]]:
    """The rules of the rendered file, and the rule in a comment."""
    found = parse_yaml(re.sub(r"(?m)^( *)# (- alert|  )", r"\1\2", text))
    rules: list[dict[str, Any]] = found.get("spec", found)["groups"][0]["rules"]
    return rules


EXAMPLE = (TEMPLATE / "examples/order-events" / FOLDER / "alerts.yaml").read_text(encoding="utf-8")
ALERTS = [rule["alert"] for rule in rules_of(EXAMPLE)]
each_alert = pytest.mark.parametrize("alert", ALERTS)
LABELS = {
    "kubernetes": {
        "app_kubernetes_io_name": "order-events",
        "app_kubernetes_io_instance": "production",
        "namespace": "production",
    },
    "compose": {"job": "order-events"},
}
"""The labels that the scrape adds to each series: test_prometheus_scrapes_the_pods proves those of Kubernetes."""
PROCESS = {"kubernetes": "pod", "compose": "instance"}


@pytest.fixture(params=LABELS)
def deploy(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def rules(render: Render, deploy: str) -> list[dict[str, Any]]:
    return rules_of(render(deploy=deploy).read(f"{FOLDER}/alerts.yaml"))


MINUTES = 90

Series = dict[str, str]


def series(labels: Mapping[str, str], start: int, metrics: Mapping[str, str]) -> Series:
    """Values for each minute, of a process that starts in this minute, as metric, labels and promtool's values."""
    before = f"_x{start - 1} " if start else ""
    found = {}
    for given, values in metrics.items():
        name, _, more = given.partition("__")
        own = dict(pair.split("=") for pair in more.split(";") if pair)
        pairs = ",".join(f'{key}="{value}"' for key, value in {**labels, **own}.items())
        found[f"consumer_{name}{{{pairs}}}"] = before + values
    return found


def process(
    deploy: str, name: str, changed: Mapping[str, str] = MappingProxyType({}), *, start: int = 0
) -> Series:
    """One process that handles no message."""
    idle = {
        "build_info__version=1": "1x90",
        "state__state=consuming": "0 1x90",
        "state__state=starting": "1 0x90",
        "messages_total__handler=n;outcome=handled": "0x90",
        "messages_total__handler=n;outcome=retried": "0x90",
        "messages_total__handler=n;outcome=rejected": "0x90",
        "messages_total__handler=none;outcome=rejected": "0x90",
        "broker_connected": "1x90",
        "paused": "0x90",
        "reconnects_total": "0x90",
        "oldest_in_flight_seconds": "0x90",
        "message_queue_seconds_bucket__le=60.0": "0x90",
        "message_queue_seconds_bucket__le=600.0": "0x90",
        "message_queue_seconds_bucket__le=+Inf": "0x90",
        "messages_in_flight": "0x90",
        "concurrency": "10x90",
        "event_loop_lag_seconds": "0.01x90",
    }
    labels = {**LABELS[deploy], PROCESS[deploy]: name}
    return series(labels, start, {**idle, **changed})


BUSY = {
    "messages_total__handler=n;outcome=handled": "0+600x90",
    "messages_total__handler=n;outcome=retried": "0+60x90",
    "message_queue_seconds_bucket__le=60.0": "0+600x90",
    "message_queue_seconds_bucket__le=600.0": "0+610x90",
    "message_queue_seconds_bucket__le=+Inf": "0+610x90",
    "messages_in_flight": "10x10 4x80",
    "last_message_timestamp_seconds": "0+60x90",
    "failures_total__handler=n;error=RuntimeError": "0+6x90",
}
HEALTHY = {
    **BUSY,
    "broker_connected": "1x29 0x3 1x58",
    "paused": "0x50 1x4 0x36",
    "reconnects_total": "0x30 1x60",
    "event_loop_lag_seconds": "0.01x40 2x2 0.01x50",
    "oldest_in_flight_seconds": "0x40 200x50",
    "messages_total__handler=none;outcome=rejected": "7x90",  # rejected long ago
}
"""An outage, a pause, a blocked loop and ten minutes at the limit, each once; planned retries, and one failure in a hundred."""

FIRES: dict[str, tuple[dict[str, str], dict[str, str]]] = {
    "NoMetrics": ({"build_info__version=1": "1x20"}, {}),
    "DeadLetters": (
        {"messages_total__handler=n;outcome=rejected": "0x30 1x60"},
        {"handler": "n"},
    ),
    "ManyFailures": (
        {"failures_total__handler=n;error=RuntimeError": "0+66x90"},
        {"handler": "n"},
    ),
    "NothingIsConsumed": ({"state__state=consuming": "0x90"}, {}),
    "BrokerIsAway": ({"broker_connected": "1x10 0x80"}, {}),
    "BrokerIsLostRepeatedly": ({"reconnects_total": "0+1x90"}, {}),
    "ServiceIsPaused": ({"paused": "1x90"}, {}),
    "HandlerHangs": ({"oldest_in_flight_seconds": "0+60x90"}, {"PROCESS": "a"}),
    "MessagesWaitLong": ({"message_queue_seconds_bucket__le=60.0": "0+300x90"}, {}),
    "HandlersAreAllBusy": ({"messages_in_flight": "10x90"}, {}),
    "EventLoopIsBlocked": ({"event_loop_lag_seconds": "2x90"}, {"PROCESS": "a"}),
    "NoMessages": ({"last_message_timestamp_seconds": "0x90"}, {}),
}
"""The changes of a busy process, alone in its service; and labels of the alert in minute 35, or 75."""
AT = {"NoMessages": 75}

Expected = list[tuple[int, str, list[dict[str, str]]]]
"""The minute, the alert, and the labels of each that fires."""


def promtool(
    folder: Path, rules: list[dict[str, Any]], *cases: tuple[Series, Expected]
) -> tuple[int, str]:
    if shutil.which("promtool") is None:
        skip_without_server(ServerMissing("promtool is not installed: apt-get install prometheus"))
    write_rules(folder, rules)
    annotations = {rule["alert"]: rule["annotations"] for rule in rules}
    severities = {rule["alert"]: rule["labels"] for rule in rules}
    tests = [
        {
            "interval": "1m",
            "input_series": [{"series": name, "values": values} for name, values in given.items()],
            "alert_rule_test": [
                {
                    "eval_time": f"{minute}m",
                    "alertname": alert,
                    "exp_alerts": [
                        {
                            "exp_labels": {**one, **severities[alert]},
                            "exp_annotations": annotations[alert],
                        }
                        for one in labels
                    ],
                }
                for minute, alert, labels in expected
            ],
        }
        for given, expected in cases
    ]
    given = {"rule_files": ["rules.yaml"], "evaluation_interval": "1m", "tests": tests}
    (folder / "tests.yaml").write_text(json.dumps(given), encoding="utf-8")
    run = subprocess.run(
        ["promtool", "test", "rules", "tests.yaml"],
        cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    return run.returncode, run.stdout


def write_rules(folder: Path, rules: list[dict[str, Any]]) -> None:
    groups = [{"name": "consumers", "rules": rules}]
    (folder / "rules.yaml").write_text(json.dumps({"groups": groups}), encoding="utf-8")


SUCCESS = (0, "Unit Testing:  tests.yaml\n  SUCCESS\n\n")
SILENCE: Expected = [(minute, alert, []) for minute in range(MINUTES) for alert in ALERTS]


def test_no_alert_fires_for_healthy_new_or_idle_services(
    tmp_path: Path, rules: list[dict[str, Any]], deploy: str
) -> None:
    rollout = process(deploy, "a", HEALTHY) | process(deploy, "b", start=60)
    idle = process(deploy, "c")  # its queue has been empty
    assert promtool(tmp_path, rules, (rollout, SILENCE), (idle, SILENCE)) == SUCCESS


def test_no_alert_fires_for_another_service(
    tmp_path: Path, rules: list[dict[str, Any]], deploy: str
) -> None:
    others: Series = {}
    for alert, (changed, _) in FIRES.items():
        other = process(deploy, alert, {**BUSY, **changed})
        others |= {name.replace("order-events", alert): values for name, values in other.items()}
    assert len(others) > len(FIRES) * 10
    given = {**process(deploy, "a", HEALTHY), **others}
    assert promtool(tmp_path, rules, (given, SILENCE)) == SUCCESS


@each_alert
def test_each_alert_fires(
    tmp_path: Path, rules: list[dict[str, Any]], deploy: str, alert: str
) -> None:
    changed, more = FIRES[alert]
    labels = {name.replace("PROCESS", PROCESS[deploy]): value for name, value in more.items()}
    labels |= {
        name: value for name, value in LABELS[deploy].items() if name != "app_kubernetes_io_name"
    }
    given = process(deploy, "a", {**BUSY, **changed})
    case = (given, [(AT.get(alert, 35), alert, [labels])])
    assert promtool(tmp_path, rules, case) == SUCCESS


def test_a_service_that_was_never_scraped_is_named(
    tmp_path: Path, rules: list[dict[str, Any]], deploy: str
) -> None:
    own = next(name for name in LABELS[deploy] if LABELS[deploy][name] == "order-events")
    expected: Expected = [(4, "NoMetrics", []), (35, "NoMetrics", [{own: "order-events"}])]
    assert promtool(tmp_path, rules, ({}, expected)) == SUCCESS


def test_the_tool_sees_a_wrong_rule(
    tmp_path: Path, rules: list[dict[str, Any]], deploy: str
) -> None:
    """An earlier rule was wrong: the time of the last message was 0 for each new process."""
    new = process(deploy, "b", {"last_message_timestamp_seconds": "0x90"}, start=60)
    given = process(deploy, "a", BUSY) | new
    [rule] = [rule for rule in rules if rule["alert"] == OPTIONAL]
    wrong = {**rule, "expr": re.sub(r"max by \(.*?\) ", "", rule["expr"])}
    assert wrong != rule
    assert promtool(tmp_path, [wrong], (given, [(61, OPTIONAL, [])]))[0] == 1


def test_rules_and_panels_use_only_metrics_that_exist() -> None:
    names = {name.strip("`").partition("{")[0] for name, _ in reference.prometheus()}
    dashboard = (TEMPLATE / "examples/order-events" / FOLDER / "dashboard.json").read_text("utf-8")
    for text in (EXAMPLE, dashboard):
        used = set(re.findall(r"\bconsumer_\w+", text))
        assert used
        assert {name.removesuffix("_bucket") for name in used} <= names


def test_no_rule_needs_what_no_scrape_sees() -> None:
    """These metrics change milliseconds before the process ends."""
    unseen: set[str] = {"abandoned", "shutdown"}
    assert not [word for word in unseen if word in EXAMPLE]


@each_alert
def test_the_runbook_has_a_section_with_at_most_three_commands(alert: str) -> None:
    url = next(rule for rule in rules_of(EXAMPLE) if rule["alert"] == alert)["annotations"]
    place, anchor = url["runbook_url"].split("#")
    assert place == "https://github.com/OWNER/cookiecutter-consumer/blob/main/docs/runbook.md"
    assert anchor == alert.lower()
    page = (TEMPLATE / "docs/runbook.md").read_text(encoding="utf-8")
    [section] = re.findall(rf"(?ms)^## {alert}\n(.*?)(?=^## |\Z)", page)
    [commands] = re.findall(r"(?s)```sh\n(.*?)```", section)
    assert 1 <= len(commands.splitlines()) <= 3


@pytest.mark.parametrize("telemetry", CHOICES["telemetry"])
@pytest.mark.parametrize("deploy", CHOICES["deploy"])
@pytest.mark.parametrize("broker", CHOICES["broker"])
def test_every_service_with_prometheus_has_valid_rules_and_a_dashboard(
    render: Render, tmp_path: Path, broker: str, deploy: str, telemetry: str
) -> None:
    service = render(broker=broker, deploy=deploy, telemetry=telemetry)
    assert service.has(FOLDER) == (telemetry in ("prometheus", "both"))
    if service.has(FOLDER):
        text = service.read(f"{FOLDER}/alerts.yaml")
        assert [rule["alert"] for rule in rules_of(text)] == ALERTS
        panels = json.loads(service.read(f"{FOLDER}/dashboard.json"))["panels"]
        scaled = "base/scaled-object.yaml" in QUESTIONS["_brokers"][broker]["kubernetes"]
        has_backlog = any("KEDA" in panel["title"] for panel in panels)
        assert has_backlog == (deploy == "kubernetes" and scaled)
        if deploy != "kubernetes":  # Prometheus itself reads the file
            assert promtool_accepts(service.path / FOLDER / "alerts.yaml")


IN_GRAFANAS_MODELS = """
import json, sys
from grafana_foundation_sdk.cog import encoder, plugins
from grafana_foundation_sdk.models.dashboard import Dashboard
plugins.register_default_plugins()
print(encoder.JSONEncoder().encode([Dashboard.from_json(one) for one in json.load(sys.stdin)]))
"""


def unknown(mine: Any, known: Any, at: str = "") -> list[str]:
    """The places in a dashboard that Grafana's models have not read."""
    if isinstance(mine, Mapping):
        pairs = [(mine[name], (known or {}).get(name), f"{at}/{name}") for name in mine]
    elif isinstance(mine, list):
        pairs = [(one, known[place], f"{at}/{place}") for place, one in enumerate(mine)]
    else:
        return [] if mine == known else [at]
    return [found for one, read, place in pairs for found in unknown(one, read, place)]


@pytest.mark.very_slow
def test_grafanas_schema_knows_each_field_of_the_dashboard(
    render: Render, reviewers: Path, tmp_path: Path
) -> None:
    dashboards = [
        json.loads(render(broker=broker, deploy=deploy).read(f"{FOLDER}/dashboard.json"))
        for broker in CHOICES["broker"]
        for deploy in CHOICES["deploy"]
    ]
    assert all(one["annotations"] == {"list": []} for one in dashboards), "the schema requires it"
    wrong = json.loads(json.dumps(dashboards[0]))
    wrong["panels"][0]["fieldConfig"]["defaults"]["units"] = "s"
    wrong["panels"][1]["targets"][0]["expresion"] = "up"
    program = [str(reviewers / "python"), "-c", IN_GRAFANAS_MODELS]
    read = run(*program, cwd=tmp_path, stdin=json.dumps([*dashboards, wrong])).stdout
    *known, of_wrong = json.loads(read)
    assert [unknown(mine, theirs) for mine, theirs in zip(dashboards, known, strict=True)] == (
        [[]] * len(dashboards)
    )
    assert unknown(wrong, of_wrong) == [
        "/panels/0/fieldConfig/defaults/units",
        "/panels/1/targets/0/expresion",
    ]


def promtool_accepts(file: Path) -> bool:
    if shutil.which("promtool") is None:
        skip_without_server(ServerMissing("promtool is not installed: apt-get install prometheus"))
    return subprocess.run(["promtool", "check", "rules", file], check=False).returncode == 0


PROMETHEUS_YAML = """\
global: {{scrape_interval: 200ms, evaluation_interval: 200ms}}
rule_files: [rules.yaml]
scrape_configs:
  - {{job_name: order-events, static_configs: [{{targets: ["127.0.0.1:{port}"], labels: {labels}}}]}}
  - {{job_name: keda, metrics_path: /keda.txt, static_configs: [{{targets: ["127.0.0.1:{keda}"]}}]}}
"""
KEDA = """\
# TYPE keda_scaler_metrics_value gauge
keda_scaler_metrics_value{metric="s0-rabbitmq-order-events",namespace="production",scaledObject="order-events",\
scaler="rabbitMQScaler",triggerIndex="0",type="scaledobject"} 7
"""
"""The metrics of KEDA 2.17's operator, with the labels of its prommetrics.go: there is no KEDA here to scrape."""


@pytest.fixture
def keda_port(tmp_path: Path) -> Iterator[int]:
    folder = tmp_path / "keda"
    folder.mkdir()
    (folder / "keda.txt").write_text(KEDA, encoding="utf-8")
    handler = partial(SimpleHTTPRequestHandler, directory=str(folder))
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = Thread(target=server.serve_forever)
    thread.start()
    yield server.server_address[1]
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.slow
def test_a_prometheus_that_scrapes_a_service_has_data_for_each_rule_and_panel_and_fires(
    tmp_path: Path, render: Render, rules: list[dict[str, Any]], deploy: str, keda_port: int
) -> None:
    program = shutil.which("prometheus")
    if program is None:
        skip_without_server(
            ServerMissing("prometheus is not installed: apt-get install prometheus")
        )
    dashboard = json.loads(render(deploy=deploy).read(f"{FOLDER}/dashboard.json"))
    probe_port, port = free_ports(2)
    service = TEMPLATE / "tests/runtime/misbehaving.py"
    scene = Scene(SqliteFile(tmp_path / "queue.db"), "order-events", tmp_path, service)
    scene.publish(3)
    scene.publish(1, end="raise")
    process = scene.start(probe_port=probe_port, retry_seconds=60)  # no dead letter yet
    folder = tmp_path / "prometheus"
    folder.mkdir()
    write_rules(folder, rules)
    labels = {**LABELS[deploy], PROCESS[deploy]: "a"}
    config = PROMETHEUS_YAML.format(port=probe_port, keda=keda_port, labels=json.dumps(labels))
    (folder / "prometheus.yml").write_text(config)
    address = f"127.0.0.1:{port}"

    def asked(path: str, **query: str) -> Any:
        url = f"http://{address}/api/v1/{path}?{urlencode(query)}"
        with urllib.request.urlopen(url, timeout=10) as answer:
            return json.loads(answer.read())["data"]

    def is_ready() -> bool:
        with suppress(OSError):
            return bool(asked("status/runtimeinfo"))
        return False

    def states() -> dict[str, dict[str, Any]]:
        return {rule["name"]: rule for group in asked("rules")["groups"] for rule in group["rules"]}

    def has_data(rule: dict[str, Any]) -> bool:
        """Whether its expression has data, without the limit; for an absence, whether the metric has."""
        value, limits = re.subn(r"\s*(==|>)\s*[\d.]+$", "", rule["query"])
        if limits != 1:
            value = re.findall(r"absent_over_time\((.*?)\[", rule["query"])[0]
        return bool(asked("query", query=value)["result"])

    def panels_without_data() -> list[str]:
        found = []
        for panel in dashboard["panels"]:
            for target in panel["targets"]:
                query = target["expr"].replace("$__rate_interval", "1m").replace("$instance", ".+")
                points = [one["value"][1] for one in asked("query", query=query)["result"]]
                if not points or "NaN" in points:
                    found.append(f"{panel['title']}: {query}")
        return found

    server = ServerProcess(
        [
            program,
            "--config.file=prometheus.yml",
            "--storage.tsdb.path=data",
            f"--web.listen-address={address}",
        ],
        folder,
        is_ready,
    )
    try:
        wait_until(lambda: states().keys() == {*ALERTS} and all(map(has_data, states().values())))
        assert states()["DeadLetters"]["state"] == "inactive"
        scene.publish(1, end="reject")
        wait_until(lambda: states()["DeadLetters"]["state"] == "firing")
        wait_until(lambda: panels_without_data() == [])
        assert len(dashboard["panels"]) >= 11
        picture = drawn(dashboard["panels"], asked, time.time() - 30, time.time(), "1m")
        assert titles_with_curves(picture) == [panel["title"] for panel in dashboard["panels"]]
        assert {rule.get("lastError", "") for rule in states().values()} == {""}
    finally:
        server.close()
        process.close()


def titles_with_curves(picture: str) -> list[str]:
    """The titles of the panels, each followed by at least one curve with points."""
    titles: list[str] = []
    with_curves = set()
    for element in ElementTree.fromstring(picture):  # the file is our own
        if element.get("class") == "title":
            titles.append(element.text or "")
        elif element.get("points"):
            with_curves.add(titles[-1])
    assert with_curves == set(titles)
    return titles


def test_the_picture_in_the_runbook_has_the_present_panels(render: Render) -> None:
    dashboard = render(broker="sqlite", deploy="none").read(f"{FOLDER}/dashboard.json")
    picture = (TEMPLATE / "docs/pictures/dashboard.svg").read_text(encoding="utf-8")
    titles = [panel["title"] for panel in json.loads(dashboard)["panels"]]
    assert titles_with_curves(picture) == titles
