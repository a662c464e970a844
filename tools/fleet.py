"""Prints a table of services that were rendered from this template: ``python3 tasks.py fleet [--json] SERVICE...``.

A SERVICE is a folder, or the URL of a git repository; no code of it runs. ``fleet --receipts [--json] [LOG...]`` sums
the receipts of their shutdowns, from files or standard input. Exit codes: 0; 1 if one could not be read.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from runtime.errors import ExitCode, UsageError
from runtime.operate.vendored import find_drift
from tools import ROOT
from tools.updating import SECTION, UNRELEASED, security_releases

OUTCOMES = ("failed", "passed", "skipped")
KINDS_OF_DRIFT = ("edited", "deleted", "added")
DEPLOYED_FROM = ("deploy/**/*.yaml", "compose.yaml", "deploy/**/*.service", ".env.example")


class Unreadable(Exception):
    """Why a service cannot be shown, in one sentence."""


@dataclass
class Receipts:
    """The shutdowns of one version of a service."""

    service: str
    version: str
    shutdowns: int = 0
    drained: int = 0
    deadline: int = 0
    forced: int = 0
    failed: int = 0
    in_flight: int = 0
    finished: int = 0
    requeued: int = 0
    abandoned: int = 0
    longest_seconds: float = 0.0

    def add(self, receipt: dict[str, Any]) -> None:
        exit_code = int(receipt["exit_code"])
        ends = {ExitCode.DRAINED: "drained", ExitCode.DEADLINE: "deadline"}
        end = ends.get(exit_code, "forced" if exit_code > 128 else "failed")  # type: ignore[call-overload]
        summed = {name: int(receipt[name]) for name in ("in_flight", "finished", "requeued")}
        summed |= {end: 1, "shutdowns": 1, "abandoned": int(receipt["abandoned_count"])}
        seconds = float(receipt["seconds"])
        for name, count in summed.items():
            setattr(self, name, getattr(self, name) + count)
        self.longest_seconds = max(self.longest_seconds, seconds)


@dataclass(frozen=True)
class Row:
    """One service."""

    service: str
    version: str
    behind: str
    """Releases of the template that are newer than the service's version; commits, if both are in this clone."""
    security: str
    """The releases that fix a vulnerability and are newer than the service's version."""
    drift: str
    """How many vendored files were edited, deleted or added."""
    broker: str
    drain_seconds: str
    shutdown_suite: str
    """``missing``, ``there``, or the outcomes of its tests when they last ran in this folder."""
    rehearsed: str
    """When its handlers were last rehearsed in this folder, on which brokers, and with what result."""


def main() -> int:
    arguments = parse_arguments()
    rows: list[Any] = []
    unread: list[str] = []
    if arguments.receipts:
        rows, unread = receipts(arguments.services)
        arguments.services = []
    for place in arguments.services:
        try:
            rows.append(looked_at(place))
        except Unreadable as reason:
            unread.append(f"{without_credentials(place)}: {reason}")
    if arguments.json:
        print(json.dumps([asdict(row) for row in rows], indent=2))
    else:
        print(table(rows, Receipts if arguments.receipts else Row))
    for sentence in unread:
        print(f"fleet: {sentence}", file=sys.stderr)
    return 1 if unread else 0


def receipts(files: list[str]) -> tuple[list[Receipts], list[str]]:
    """The sums of each version of a service, and the unreadable files. Lines without a receipt do not count."""
    found: dict[tuple[str, str], Receipts] = {}
    unread = []
    for name in files or ["-"]:
        try:
            with sys.stdin.buffer if name == "-" else Path(name).open("rb") as log:
                for line in log:
                    _, brace, rest = line.decode(errors="replace").partition("{")  # after a prefix
                    if '"stopped"' in rest and (receipt := receipt_in(brace + rest)):
                        key = str(receipt["service"]), str(receipt["version"])
                        found.setdefault(key, Receipts(*key)).add(receipt)
        except OSError as error:
            unread.append(f"{name}: {error.strerror}")
    return [found[key] for key in sorted(found)], unread


def receipt_in(line: str) -> dict[str, Any] | None:
    """The log event `stopped` in this line, if it is complete."""
    try:
        event: Any = json.loads(line)
        Receipts(event["service"], event["version"]).add(event)
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None
    return event if event["event"] == "stopped" else None


def looked_at(place: str) -> Row:
    if Path(place).is_dir():
        return row(Path(place))
    with tempfile.TemporaryDirectory(prefix="fleet-") as scratch:
        # A link of another repository could lead to a file of this machine: git writes it as a text.
        clone = ["git", "-c", "core.symlinks=false", "clone", "--quiet", "--depth", "1"]
        clone += ["--", place, scratch]
        try:
            result = subprocess.run(
                clone, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False
            )
        except OSError:
            raise Unreadable("it is no folder, and git is not installed.") from None
        if result.returncode != 0:
            raise Unreadable("it is no folder, and git cannot clone it.")
        return row(Path(scratch))


def row(service: Path) -> Row:
    try:
        recorded = json_of(service / ".template-answers.json")
        answers = recorded["answers"]
        slug, package, broker = (
            answers[name] for name in ("project_slug", "package_name", "broker")
        )
        version = recorded["version"]
    except (KeyError, TypeError):
        raise Unreadable("it has no .template-answers.json of this template.") from None
    if not re.fullmatch(r"[a-z][a-z0-9_]*", str(package)):
        raise Unreadable("its .template-answers.json names no package.")
    version = str(version)
    return Row(
        service=str(slug),
        version=version,
        behind=how_far_behind(version, str(recorded.get("commit", ""))),
        security=", ".join(security_releases(changes(), after=version)) or "-",
        drift=drift(service, package),
        broker=str(broker),
        drain_seconds=drain_seconds(service, package),
        shutdown_suite=suite(service),
        rehearsed=rehearsal(service),
    )


def changes() -> str:
    return (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def how_far_behind(version: str, commit: str) -> str:
    sections = SECTION.findall(changes())
    releases = [one for one, mark, _ in sections if mark != UNRELEASED] or [sections[-1][0]]
    newer = releases.index(version) if version in releases else len(releases)
    behind = f"{newer} release{'s' if newer != 1 else ''}" if newer else "-"
    if re.fullmatch("[0-9a-f]{40}", commit):
        count = ["git", "-C", str(ROOT), "rev-list", "--count", f"{commit}..HEAD"]
        try:
            result = subprocess.run(count, capture_output=True, text=True, check=False)
        except OSError:
            return behind
        if result.returncode == 0 and result.stdout.strip() != "0":
            behind = f"{behind}, {result.stdout.strip()} commits".removeprefix("-, ")
    return behind


def drift(service: Path, package: str) -> str:
    try:
        found, _ = find_drift(service, package)
    except (UsageError, OSError, ValueError):
        return "not comparable"
    kinds = Counter(difference.partition(":")[0] for difference in found)
    return ", ".join(f"{kinds[kind]} {kind}" for kind in KINDS_OF_DRIFT if kinds[kind]) or "-"


def drain_seconds(service: Path, package: str) -> str:
    """From the files for deployment, or the default of its settings; values that are set elsewhere are not seen."""
    found: set[str] = set()
    for pattern in DEPLOYED_FROM:
        for file in service.glob(pattern):
            text = text_of(file)
            found |= set(re.findall(r"^(?!\s*#).*\bCONSUMER_DRAIN_SECONDS\W+([\d.]+)", text, re.M))
    if not found:
        text = text_of(service / "src" / package / "runtime/settings.py")
        found = set(re.findall(r"drain_seconds: float = Field\(default=([\d.]+)", text))
    return ", ".join(sorted(found)) or "?"


def suite(service: Path) -> str:
    if not (service / "tests/runtime/test_shutdown.py").exists():
        return "missing"
    kept = service / ".pytest_cache/v/consumer/shutdown_suite"  # its tests/conftest.py writes it
    try:
        outcomes = json_of(kept)
        counts = {outcome: int(outcomes.get(outcome, 0)) for outcome in OUTCOMES}
    except (ValueError, AttributeError, TypeError, OverflowError):
        return "there"
    return ", ".join(f"{count} {outcome}" for outcome, count in counts.items() if count) or "there"


def rehearsal(service: Path) -> str:
    try:
        kept = json_of(service / ".rehearsal.json")
        brokers, at = " and ".join(map(str, kept["brokers"])), str(kept["at"])
        result = f"{len(kept['findings'])} broken" if kept["findings"] else "kept"
    except (KeyError, TypeError):
        return "never here"
    return f"{at[:16].replace('T', ' ')} on {brokers}: {result}"


def text_of(file: Path) -> str:
    """The text of a file; empty if it is no file, or cannot be read."""
    try:
        return file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""
    except OSError:
        return ""


def json_of(file: Path) -> Any:
    """The value of a JSON file; None if it is no file, or no JSON."""
    try:
        return json.loads(text_of(file))
    except (ValueError, RecursionError):
        return None


def table(rows: list[Any], of: type[Any] = Row) -> str:
    names = [field.name for field in fields(of)]
    cells = [
        [name.replace("_", " ") for name in names],
        *(list(map(str, asdict(one).values())) for one in rows),
    ]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ("   ".join(map(str.ljust, line, widths)).rstrip() for line in cells)
    return "\n".join(map(printable, lines))


def printable(line: str) -> str:
    """The line without control characters: text of another repository must not control the terminal."""
    return "".join(character if character.isprintable() else "?" for character in line)


def without_credentials(place: str) -> str:
    return re.sub(r"(?<=://)[^/@]*@", "", place)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="tasks.py fleet", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("services", nargs="*", metavar="SERVICE", help="a folder, or a git URL")
    parser.add_argument("--json", action="store_true", help="print JSON, for dashboards")
    receipts = (
        "sum the receipts of shutdowns: each SERVICE is a file with logs; by default standard input"
    )
    parser.add_argument("--receipts", action="store_true", help=receipts)
    arguments = parser.parse_args()
    if not (arguments.services or arguments.receipts):
        parser.error("the following arguments are required: SERVICE")
    return arguments


if __name__ == "__main__":
    sys.exit(main())
