"""Makes a version of the template: ``python3 tasks.py release X.Y.Z``. You commit, tag and push it.

The version is `_template_version` of cookiecutter.json; pyproject.toml, the first line of each vendored file,
`TEMPLATE_VERSION` of the runtime, the `--checkout` that the documents show and the example follow it here, and so does
the cookiecutter of tools/updating.py. CHANGELOG.md must have a section for it with upgrade notes; a heading
``### Security`` in it marks a release that fixes a vulnerability (SECURITY.md). It prints the commands that make the
tag. ``--notes`` prints the section, for the release's page. Exit codes: 0; 2 with one sentence, and nothing written.
"""

import argparse
import json
import re
import subprocess
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

from tools import PACKAGE, ROOT
from tools.updating import SECTION, UNRELEASED, numbers

CHANGES = ROOT / "CHANGELOG.md"
QUESTIONS = ROOT / "cookiecutter.json"
PROJECT = ROOT / "pyproject.toml"
FIRST_LINE = re.compile(r"^# cookiecutter-consumer \S+ \|")
VENDORED = (
    "{{cookiecutter.project_slug}}/src/{{cookiecutter.package_name}}/runtime/**/*.py",
    "{{cookiecutter.project_slug}}/tests/runtime/**/*.py",
    "tests/own_broker/*.py",
)
RUNTIME = PACKAGE / "runtime/settings.py"
DOCUMENTS = ("README.md", "docs/updates.md")
UPDATING = ROOT / "tools/updating.py"


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="tasks.py release", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("version", metavar="X.Y.Z")
    parser.add_argument("--notes", action="store_true", help="only print the section")
    arguments = parser.parse_args()
    version = arguments.version.removeprefix("v")
    if not re.fullmatch(r"\d+\.\d+\.\d+", version):
        return refuse(f"{version!r} is no version, such as 1.2.3.")
    changes = CHANGES.read_text(encoding="utf-8")
    section = next((one for one in SECTION.finditer(changes) if one[1] == version), None)
    if section is None:
        return refuse(f"CHANGELOG.md has no section {version}.")
    for heading, needed in (("Upgrade notes", True), ("Security", "### Security\n" in section[3])):
        if needed and not re.search(rf"^### {heading}\n\s*\n?(?!#)\S", section[3], re.M):
            return refuse(f"the section {version} of CHANGELOG.md has no {heading.lower()}.")
    if arguments.notes:
        print(section[3].strip())
        return 0
    if section[2] != UNRELEASED:
        return refuse(f"the section {version} of CHANGELOG.md is not marked{UNRELEASED}.")
    old = json.loads(QUESTIONS.read_text(encoding="utf-8"))["_template_version"]
    if numbers(version) < numbers(old):
        return refuse(f"{version} is older than {old}.")
    today = datetime.now(UTC).date().isoformat()
    replace(CHANGES, rf"^## {re.escape(version)} \(not released\)$", f"## {version} ({today})")
    replace(QUESTIONS, r'"_template_version": "[^"]+"', f'"_template_version": "{version}"')
    replace(PROJECT, r'^version = "[^"]+"', f'version = "{version}"')
    # The version that renders the example is the version for services without cookiecutter.
    installed = metadata.version("cookiecutter")
    replace(UPDATING, r'^COOKIECUTTER = "[^"]+"', f'COOKIECUTTER = "{installed}"')
    replace(UPDATING, r'^COOKIECUTTER_UNTIL = "[^"]+"', f'COOKIECUTTER_UNTIL = "{today}"')
    for name in DOCUMENTS:
        replace(ROOT / name, r"--checkout v\d+\.\d+\.\d+", f"--checkout v{version}")
    replace(RUNTIME, r'^TEMPLATE_VERSION = "[^"]+"', f'TEMPLATE_VERSION = "{version}"')
    for pattern in VENDORED:
        for path in ROOT.glob(pattern):
            replace(path, FIRST_LINE.pattern, f"# cookiecutter-consumer {version} |")
    subprocess.run([sys.executable, "-m", "tools.example"], cwd=ROOT, check=True)
    print(
        f"Next: git commit --all --message {version}"
        f" && git tag --annotate v{version} --message {version}"
        f" && git push origin main v{version}"
    )
    return 0


def replace(path: Path, pattern: str, text: str) -> None:
    """Replace the match of the pattern, which must exist, by the text."""
    new, count = re.subn(pattern, text, path.read_text(encoding="utf-8"), flags=re.M)
    assert count, f"{path} has no {pattern}"
    path.write_text(new, encoding="utf-8", newline="\n")


def refuse(sentence: str) -> int:
    print(f"release: {sentence}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
