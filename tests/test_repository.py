"""The template's own files agree with each other, and tasks.py needs nothing but Python and pip."""

import re
import sys
import tomllib
from pathlib import Path

import pytest

import tasks
from conftest import Render
from rendered import QUESTIONS, TEMPLATE, TREE, run

PROJECT = tomllib.loads((TEMPLATE / "pyproject.toml").read_text("utf-8"))
BASE_PYTHON = str(Path(sys.base_prefix, "bin/python3"))


def test_the_version_is_the_same_everywhere() -> None:
    changes = (TEMPLATE / "CHANGELOG.md").read_text("utf-8")
    latest = re.findall(r"^## (\d+\.\d+\.\d+)", changes, re.M)[0]
    assert PROJECT["project"]["version"] == QUESTIONS["_template_version"] == latest


def test_the_tasks_use_what_a_service_uses(render: Render) -> None:
    declared: set[str] = set()
    for question in ("broker", "telemetry"):
        for answer in QUESTIONS[question]:
            declared |= set(render(**{question: answer}).metadata["project"]["dependencies"])
    assert set(PROJECT["dependency-groups"]["service"]) == declared
    assert set(render().metadata["dependency-groups"]["lint"]) <= set(tasks.requirements("lint"))


DOCUMENTS = [TEMPLATE / "README.md", *sorted((TEMPLATE / "docs").rglob("*.md"))]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_test_that_a_document_names_is_there(document: Path) -> None:
    check_named_tests(document.read_text("utf-8"), [TEMPLATE, TREE / "tests/runtime"])


def test_every_test_that_the_readme_of_a_service_names_is_there(render: Render) -> None:
    answers = [(q, answer) for q in ("broker", "telemetry") for answer in QUESTIONS[q]]
    for question, answer in answers:
        service = render(**{question: answer})
        check_named_tests(service.read("README.md"), [service.path / "tests/runtime"])


def check_named_tests(text: str, folders: list[Path]) -> None:
    for name, function in re.findall(r"`((?:tests/)?test_\w+\.py)(?:::(\w+))?`", text):
        files = [folder / name for folder in folders if (folder / name).exists()]
        assert files, f"there is no {name}"
        assert not function or f"def {function}(" in files[0].read_text("utf-8"), function


@pytest.mark.parametrize("arguments", [["unknown"], []])
def test_an_unknown_task_is_one_sentence(arguments: list[str]) -> None:
    result = run(BASE_PYTHON, "tasks.py", *arguments, cwd=TEMPLATE, check=False)
    assert result.returncode == 2
    assert result.stdout.count("\n") == 1
    assert "demo, test, bench, fleet, pictures, lint" in result.stdout


def test_tasks_need_only_python_and_pip(tmp_path: Path) -> None:
    (tmp_path / "tasks.py").write_bytes((TEMPLATE / "tasks.py").read_bytes())
    declared = tmp_path / "pyproject.toml"
    declared.write_text(
        '[dependency-groups]\ntest = [{ include-group = "a" }]\na = ["pytest>=9"]\n'
    )

    def run_test() -> str:
        command = [BASE_PYTHON, "tasks.py", "test", "--version"]
        return run(*command, cwd=tmp_path, env={"PATH": str(tmp_path)}).stdout

    first, second = run_test(), run_test()
    assert "Installing what `test` needs" in first
    assert re.fullmatch(r"pytest 9\S+\n", second)
    declared.write_text(declared.read_text().replace('"pytest>=9"', '"pytest>=9", "iniconfig>=2"'))
    assert "Installing what `test` needs" in run_test()
