"""The services that were rendered from this template, in one table: ``python3 tasks.py fleet [--json] SERVICE...``.

A SERVICE is a folder, or the URL of a git repository; no code of it runs. Exit codes: 0; 1 if one could not be read.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from runtime.errors import UsageError
from runtime.operate.vendored import find_drift
from tools import ROOT

OUTCOMES = ("failed", "passed", "skipped")
DEPLOYED_FROM = ("deploy/**/*.yaml", "compose.yaml", "deploy/**/*.service", ".env.example")


class Unreadable(Exception):
    """Why a service cannot be shown, in one sentence."""


@dataclass(frozen=True)
class Row:
    """One service."""

    service: str
    version: str
    behind: str
    """Releases of the template that are newer than the service's version; commits, where both are in this clone."""
    drift: str
    """How many vendored files were edited, deleted or added."""
    broker: str
    drain_seconds: str
    shutdown_suite: str
    """``missing``, ``there``, or the outcomes of its tests when they last ran in this folder."""


def main() -> int:
    arguments = parse_arguments()
    rows, unread = [], []
    for place in arguments.services:
        try:
            rows.append(looked_at(place))
        except Unreadable as reason:
            unread.append(f"{without_credentials(place)}: {reason}")
    if arguments.json:
        print(json.dumps([asdict(row) for row in rows], indent=2))
    else:
        print(table(rows))
    for sentence in unread:
        print(f"fleet: {sentence}", file=sys.stderr)
    return 1 if unread else 0


def looked_at(place: str) -> Row:
    if Path(place).is_dir():
        return row(Path(place))
    with tempfile.TemporaryDirectory(prefix="fleet-") as scratch:
        clone = ["git", "clone", "--quiet", "--depth", "1", "--", place, scratch]
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
        recorded = json.loads((service / ".template-answers.json").read_text(encoding="utf-8"))
        answers = recorded["answers"]
        slug, package, broker = (
            answers[name] for name in ("project_slug", "package_name", "broker")
        )
        version = recorded["version"]
    except (OSError, ValueError, KeyError, TypeError):
        raise Unreadable("it has no .template-answers.json of this template.") from None
    if not re.fullmatch(r"[a-z][a-z0-9_]*", str(package)):
        raise Unreadable("its .template-answers.json names no package.")
    behind = how_far_behind(str(version), str(recorded.get("commit", "")))
    drain = drain_seconds(service, package)
    return Row(
        str(slug), str(version), behind, drift(service, package), str(broker), drain, suite(service)
    )


def how_far_behind(version: str, commit: str) -> str:
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    sections = re.findall(r"^## (\S+)( \(not released\))?", changes, re.M)
    releases = [one for one, not_released in sections if not not_released] or [sections[-1][0]]
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
        found = find_drift(service, package)
    except (UsageError, OSError, ValueError):
        return "not comparable"
    kinds = {kind: len(getattr(found, kind)) for kind in ("edited", "deleted", "added")}
    return ", ".join(f"{count} {kind}" for kind, count in kinds.items() if count) or "-"


def drain_seconds(service: Path, package: str) -> str:
    """From the files for deployment, else the default of its settings; a value that is set elsewhere is not seen."""
    found: set[str] = set()
    for pattern in DEPLOYED_FROM:
        for file in service.glob(pattern):
            text = file.read_text(encoding="utf-8", errors="replace")
            found |= set(re.findall(r"^(?!\s*#).*\bCONSUMER_DRAIN_SECONDS\W+([\d.]+)", text, re.M))
    if not found:
        settings = service / "src" / package / "runtime/settings.py"
        text = settings.read_text(encoding="utf-8") if settings.exists() else ""
        found = set(re.findall(r"drain_seconds: float = Field\(default=([\d.]+)", text))
    return ", ".join(sorted(found)) or "?"


def suite(service: Path) -> str:
    if not (service / "tests/runtime/test_shutdown.py").exists():
        return "missing"
    kept = service / ".pytest_cache/v/consumer/shutdown_suite"  # by its tests/conftest.py
    try:
        outcomes: Any = json.loads(kept.read_text(encoding="utf-8"))
        counts = {outcome: int(outcomes.get(outcome, 0)) for outcome in OUTCOMES}
    except (OSError, ValueError, AttributeError, TypeError):
        return "there"
    return ", ".join(f"{count} {outcome}" for outcome, count in counts.items() if count) or "there"


def table(rows: list[Row]) -> str:
    names = [field.name for field in fields(Row)]
    cells = [
        [name.replace("_", " ") for name in names],
        *(list(asdict(one).values()) for one in rows),
    ]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ("   ".join(map(str.ljust, line, widths)).rstrip() for line in cells)
    return "\n".join(map(printable, lines))


def printable(line: str) -> str:
    """The text of another repository must not control the terminal."""
    return "".join(character if character.isprintable() else "?" for character in line)


def without_credentials(place: str) -> str:
    return re.sub(r"(?<=://)[^/@]*@", "", place)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="tasks.py fleet", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("services", nargs="+", metavar="SERVICE", help="a folder, or a git URL")
    parser.add_argument("--json", action="store_true", help="for dashboards")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
