"""The questions of a company's lawyers: the vendored part needs no notice, and nothing claims the team's part.

`reuse` is the program of the REUSE specification, which licence scanners follow.
"""

import json
import re
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest

from support.rendered import CHOICES, TEMPLATE, TREE, Render, Service, run

VENDORED = re.compile(
    r"(src/\w+|tests)/runtime/.*\.(py|html)|tests/conftest\.py|tests/deploy/test_\w+\.py|tools/\w+\.py"
)


def licences(service: Service) -> dict[str, list[str]]:
    """The licence expressions in each file, read by `reuse`."""
    report = json.loads(run("reuse", "lint", "--json", cwd=service.path, check=False).stdout)
    assert report["non_compliant"]["bad_licenses"] == []
    found = {}
    for file in report["files"]:
        assert all(one["is_valid"] for one in file["spdx_expressions"]), file
        found[file["path"]] = [one["value"] for one in file["spdx_expressions"]]
    return found


@pytest.mark.parametrize("broker", CHOICES["broker"])
def test_each_vendored_file_is_0bsd_and_no_other_claims_a_licence(
    render: Render, broker: str
) -> None:
    service = render(broker=broker)
    found = licences(service)
    # reuse skips empty files.
    assert found.keys() >= {name for name, text in service.files.items() if text} - {"uv.lock"}
    vendored = {name for name in found if VENDORED.fullmatch(name)}
    assert len(vendored) > 40
    assert {name for name, named in found.items() if named} == vendored
    assert all(found[name] == ["0BSD"] for name in vendored)


def test_a_licence_inside_other_words_is_none(render_own: Render) -> None:
    """Therefore the licence is the last part of its line."""
    service = render_own()
    name = "tests/runtime/test_drift.py"
    first, rest = service.read(name).split("\n", 1)
    *words, licence = first.removeprefix("# ").split(" | ")
    service.write(name, f"# {' | '.join([licence, *words])}\n{rest}")
    with pytest.raises(AssertionError, match="is_valid"):
        licences(service)


def test_the_license_grants_what_is_rendered_without_a_condition() -> None:
    text = (TEMPLATE / "LICENSE").read_text("utf-8")
    mit, _, exception = text.partition("\n\nException")
    assert mit.startswith("MIT License")
    assert "SPDX-License-Identifier: 0BSD" in exception
    assert f"`{TREE.name}/`" in exception
    # The text of 0BSD itself.
    granted = "copy, modify, and/or distribute this software for any purpose with or without fee"
    assert granted in " ".join(exception.split())
    assert "provided that" not in exception
    assert "notice" not in exception.partition("Permission to use")[2]


@pytest.mark.parametrize("chosen", [False, True], ids=["no licence yet", "the team's licence"])
def test_a_wheel_claims_only_the_licence_that_the_team_chose(
    render_own: Render, tmp_path: Path, chosen: bool
) -> None:
    service = render_own()
    if chosen:
        declared = service.read("pyproject.toml")
        line = re.compile(r"^# license = .*$", re.M)
        text = line.sub('license = "LicenseRef-Proprietary"', declared)
        assert text != declared
        service.write("pyproject.toml", text)
    run("uv", "build", "--quiet", "--wheel", "--out-dir", str(tmp_path), cwd=service.path)
    [path] = tmp_path.glob("*.whl")
    with zipfile.ZipFile(path) as wheel:
        names = wheel.namelist()
        [metadata] = [name for name in names if name.endswith(".dist-info/METADATA")]
        headers = message_from_bytes(wheel.read(metadata))
        assert headers.get_all("License-Expression", []) == ["LicenseRef-Proprietary"] * chosen
        assert "License" not in headers
        assert [one for one in headers.get_all("Classifier", []) if "License" in one] == []
        claims = {name for name in names if b"SPDX-License" in wheel.read(name)}
        runtime = {
            name for name in names if "/runtime/" in name and not name.endswith((".sha256", "/"))
        }
        assert claims == runtime
    assert len(runtime) > 20


def test_the_readme_answers_a_lawyer(render: Render) -> None:
    readme = render().read("README.md")
    [paragraph] = [one for one in readme.split("\n\n") if "0BSD" in one]
    assert "without a notice" in paragraph
    assert "yours" in paragraph
    assert "MIT" not in readme
