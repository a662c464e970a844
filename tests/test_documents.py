"""The documents: their links work, the site builds, and their statements about the code are true."""

import re
import shutil
import sys
from pathlib import Path

import pytest

from support.rendered import CHOICES, QUESTIONS, TEMPLATE, Render, Result, run, run_tool

REPOSITORY = "https://github.com/OWNER/cookiecutter-consumer"
AT_THE_TOP = sorted(TEMPLATE.glob("*.md"))
PAGES = sorted((TEMPLATE / "docs").rglob("*.md"))
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")


def broken_links(document: Path, text: str) -> list[str]:
    """Relative links and those into this repository; others would need the network."""
    prose = re.sub(r"^```.*?^```|`[^`\n]+`", "", text, flags=re.M | re.S)
    return [link for link in LINK.findall(prose) if not leads_somewhere(document, link)]


def leads_somewhere(document: Path, link: str) -> bool:
    if link.startswith(REPOSITORY):
        path, _, anchor = link.removeprefix(REPOSITORY).partition("#")
        if path.startswith("/compare/v"):  # of a tag, which is elsewhere
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
    """Those of the headings, as GitHub and the site make them."""
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
    """The pages, and the program that builds them."""
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
    """The promised names, written down here by hand."""
    reference = (TEMPLATE / "docs/reference.md").read_text(encoding="utf-8")
    settings = (
        "BROKER_URL SOURCE GROUP CONCURRENCY PREFETCH DRAIN_SECONDS CONNECT_SECONDS MAX_ATTEMPTS RETRY_SECONDS"
        " RETRY_MAX_SECONDS BATCH_SIZE BATCH_SECONDS PROBE_PORT LOG_FORMAT LOG_LEVEL"
    )
    events = (
        "starting connected consuming message_retried message_rejected reconnecting stop_requested draining"
        " message_abandoned forced drained stopped"
    )
    metrics = (
        "consumer_messages_total{handler,outcome} consumer_message_duration_seconds"
        " consumer_messages_in_flight consumer_state{state} consumer_last_message_timestamp_seconds"
        " consumer_reconnects_total consumer_shutdown_duration_seconds consumer_messages_abandoned_total"
    )
    names = [f"CONSUMER_{name}" for name in settings.split()] + events.split() + metrics.split()
    names += ["0", "1", "2", "69", "75", "128 + n"]
    assert [name for name in names if f"| `{name}` |" not in reference] == []


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
