"""The documents: their links work, the site builds, and their statements about the code are true."""

import ast
import re
import shutil
import sys
from pathlib import Path

import pytest

from support.rendered import CHOICES, QUESTIONS, TEMPLATE, TREE, Render, Result, run, run_tool
from tools import reference

REPOSITORY = "https://github.com/OWNER/cookiecutter-consumer"
AT_THE_TOP = sorted(TEMPLATE.glob("*.md"))
PAGES = sorted((TEMPLATE / "docs").rglob("*.md"))
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")


def broken_links(document: Path, text: str) -> list[str]:
    """Broken links among relative ones and those into this repository; others would need the network."""
    prose = re.sub(r"^```.*?^```|`[^`\n]+`", "", text, flags=re.M | re.S)
    return [link for link in LINK.findall(prose) if not leads_somewhere(document, link)]


def leads_somewhere(document: Path, link: str) -> bool:
    if link.startswith(REPOSITORY):
        path, _, anchor = link.removeprefix(REPOSITORY).partition("#")
        if path.startswith("/compare/v"):  # the tag is on GitHub only
            return path == f"/compare/v{QUESTIONS['_template_version']}...main"
        target = TEMPLATE / (re.sub("^/(blob|tree)/main/", "", path).strip("/") or "README.md")
    elif re.match(r"\w+:", link):
        return True
    else:
        path, _, anchor = link.partition("#")
        target = document.parent / path if path else document
    if not target.exists():
        return False
    return not anchor or anchor in anchors(target.read_text(encoding="utf-8"))


def anchors(text: str) -> set[str]:
    """The anchors of the headings, in the format of GitHub and the site."""
    headings = re.findall(r"^#+ (.+)", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize(
    "document", [*AT_THE_TOP, *PAGES], ids=lambda path: path.relative_to(TEMPLATE).as_posix()
)
def test_every_link_leads_somewhere(document: Path) -> None:
    assert broken_links(document, document.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("ci", CHOICES["ci"])
@pytest.mark.parametrize("deploy", CHOICES["deploy"])
def test_every_link_in_the_readme_of_a_service_leads_somewhere(
    render: Render, deploy: str, ci: str
) -> None:
    service = render(deploy=deploy, ci=ci)
    assert broken_links(service.path / "README.md", service.read("README.md")) == []


@pytest.mark.parametrize(
    ("link", "works"),
    [
        ("docs/shutdown.md#the-deadline", True),
        ("docs/shutdown.md#the-dead-line", False),
        ("docs/stop.md", False),
        ("docs/pictures/none.svg", False),
        ("#no-such-heading", False),
        (f"{REPOSITORY}/blob/main/CHANGELOG.md", True),
        (f"{REPOSITORY}/blob/main/CHANGES.md", False),
        (f"{REPOSITORY}#no-such-heading", False),
    ],
)
def test_the_check_of_links_sees(link: str, works: bool) -> None:
    found = broken_links(TEMPLATE / "README.md", f"See [there]({link}).")
    assert found == ([] if works else [link])


def build(folder: Path) -> Result:
    return run_tool("site", cwd=folder, check=False)


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """The pages, and the program that builds the site."""
    shutil.copytree(TEMPLATE / "docs", tmp_path / "docs")
    (tmp_path / "tools").mkdir()
    for name in ("__init__.py", "site.py"):
        shutil.copy(TEMPLATE / "tools" / name, tmp_path / "tools")
    shutil.copy(TEMPLATE / "zensical.toml", tmp_path)
    return tmp_path


def test_the_site_builds_and_asks_nothing_of_other_servers(site: Path) -> None:
    others = site / ".cache/environments"
    others.mkdir(parents=True)
    result = build(site)
    assert result.returncode == 0, result.stdout
    assert others.exists()
    built = site / ".cache/site"
    pages = list(built.rglob("*.html"))
    assert len(pages) == len(PAGES) + 1, "404.html is the one that has no source"
    loaded = re.compile(r"""(?:src=|<link[^>]+rel="?stylesheet"?[^>]+href=)["']?(https?:)?//""")
    assert [page.name for page in pages if loaded.search(page.read_text("utf-8"))] == []
    listed = (TEMPLATE / "zensical.toml").read_text(encoding="utf-8")
    unlisted = [
        p for p in PAGES if f'"{p.relative_to(TEMPLATE / "docs").as_posix()}"' not in listed
    ]
    assert unlisted == []


@pytest.mark.parametrize("link", ["nowhere.md", "ordering.md#nowhere"])
def test_a_broken_link_or_anchor_fails_the_build(site: Path, link: str) -> None:
    with (site / "docs/retries.md").open("a", encoding="utf-8") as page:
        page.write(f"\n[There]({link})\n")
    result = build(site)
    assert result.returncode != 0
    assert "does not exist" in result.stdout


def test_the_reference_is_up_to_date() -> None:
    result = run_tool("reference", "--check", check=False)
    assert result.returncode == 0, result.stdout


def test_the_reference_has_what_others_rely_on() -> None:
    """The promised names, listed here by hand."""
    page = (TEMPLATE / "docs/reference.md").read_text(encoding="utf-8")
    settings = (
        "BROKER_URL BROKER_URL_FILE SOURCE GROUP CONCURRENCY PREFETCH DRAIN_SECONDS CONNECT_SECONDS MAX_ATTEMPTS"
        " RETRY_SECONDS RETRY_MAX_SECONDS BREAKER_FAILURES BATCH_SIZE BATCH_SECONDS PROBE_PORT LOG_FORMAT LOG_LEVEL"
    )
    events = (
        "starting connected consuming message_retried message_rejected reconnecting stop_requested draining"
        " paused resumed message_abandoned forced drained stopped"
    )
    metrics = (
        "consumer_messages_total{handler,outcome} consumer_message_duration_seconds{handler}"
        " consumer_message_queue_seconds consumer_oldest_in_flight_seconds consumer_concurrency"
        " consumer_event_loop_lag_seconds consumer_build_info{version,template,broker}"
        " consumer_messages_in_flight consumer_paused consumer_state{state} consumer_last_message_timestamp_seconds"
        " consumer_reconnects_total consumer_shutdown_duration_seconds consumer_messages_abandoned_total"
    )
    names = [f"CONSUMER_{name}" for name in settings.split()] + events.split() + metrics.split()
    names += ["0", "1", "2", "69", "75", "77", "128 + n"]
    assert [name for name in names if f"| `{name}` |" not in page] == []


def test_the_log_has_one_name_for_a_messages_id() -> None:
    """The name that is bound for the lines of a handler: otherwise a line would have the same value twice."""
    rows = [*reference.events(of_brokers=False), *reference.events(of_brokers=True)]
    assert {event: fields for event, _, fields, *_ in rows if "id" in fields.split(", ")} == {}
    fields = {event: set(fields.split(", ")) for event, _, fields, *_ in rows}
    for event in ("message_retried", "message_rejected"):
        assert {"message_id", "type", "handler", "attempt", "reason"} <= fields[f"`{event}`"]


NAMED = re.compile(r"((?:[\w-]+/)*test_\w+\.py)::((?:\w+::)*test_\w+)")
FOLDERS = ("", "tests", "tests/runtime", f"{TREE.name}/tests/runtime", TREE.name)
"""The folders in which a page's paths begin: docs/production.md says which apply."""


def missing_tests(text: str) -> list[str]:
    """The tests that a page names, and that no file has."""
    missing = []
    for file, test in NAMED.findall(text):
        found = [path for folder in FOLDERS if (path := TEMPLATE / folder / file).is_file()]
        names = {
            node.name
            for path in found
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        }
        missing += [] if names.issuperset(test.split("::")) else [f"{file}::{test}"]
    return missing


@pytest.mark.parametrize(
    "document", [*AT_THE_TOP, *PAGES], ids=lambda path: path.relative_to(TEMPLATE).as_posix()
)
def test_every_test_that_a_page_names_exists(document: Path) -> None:
    assert missing_tests(document.read_text(encoding="utf-8")) == []


def test_the_check_of_names_sees() -> None:
    here = "test_every_test_that_a_page_names_exists"
    text = (
        f"`tests/test_documents.py::{here}`, `test_documents.py::test_gone`, `test_no.py::test_a`"
    )
    assert missing_tests(text) == ["test_documents.py::test_gone", "test_no.py::test_a"]


def test_each_line_of_the_checklist_names_its_test_or_says_that_it_is_yours() -> None:
    page = (TEMPLATE / "docs/production.md").read_text(encoding="utf-8")
    rows = [line for line in page.splitlines() if line.startswith("| ") and "---" not in line]
    rows = [line for line in rows if not line.startswith("| asked ")]
    assert len(rows) > 45
    assert [row for row in rows if not NAMED.search(row) and "By you" not in row] == []
    assert [row for row in rows if "`" not in row.split("|")[3] and "| By you: " not in row] == []


def test_each_file_of_the_checklist_is_one_of_a_service_or_of_the_template(render: Render) -> None:
    """The files in the third column, and in the list of code owners."""
    answers: list[dict[str, str]] = [
        {"deploy": "kubernetes", "ci": "github"},
        {"deploy": "compose", "ci": "gitlab", "telemetry": "both"},
        {"deploy": "systemd", "telemetry": "opentelemetry"},
    ]
    known = {f"/{name}" for answer in answers for name in render(**answer).files} | {"/uv.lock"}
    page = (TEMPLATE / "docs/production.md").read_text(encoding="utf-8")
    rows = [line.split(" | ")[-2] for line in page.splitlines() if line.count(" | ") == 3]
    files = [f"/{file}" for cell in rows for file in re.findall("`([^`]+)`", cell)]
    files += re.findall(r"^(/\S+) +@your-org", page, re.M)
    assert len(files) > 50
    for file in files:
        pattern = re.escape(file).replace(r"\*", "[^/]+") + ("" if file.endswith("/") else "$")
        in_a_service = any(re.search(pattern, name) for name in known)
        assert in_a_service or (TEMPLATE / file[1:]).exists(), file


def test_the_example_of_a_lost_item_does_what_the_page_shows() -> None:
    page = (TEMPLATE / "docs/lost-items.md").read_text(encoding="utf-8")
    shown = re.search(r"^```text\n(.*?)^```", page, re.M | re.S)
    assert shown
    [command] = re.findall(r"`(PYTHONPATH=\S+ python3 \S+\.py)`", page)
    strict = command.replace("python3", f"{sys.executable} -X dev -W error")
    printed = run("sh", "-c", strict, cwd=TEMPLATE).stdout
    assert printed == shown[1]
    naive, ours = zip(*(line.split()[1:] for line in printed.splitlines()[1:]), strict=True)
    assert "LOST" in naive
    assert "LOST" not in ours
