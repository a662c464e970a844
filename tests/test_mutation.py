"""`tasks.py mutate` fails when a test is missing, and its list of survivors is no longer than necessary.

The long form is ``python3 tasks.py mutate``; docs/proof.md has its results.
"""

import ast
import re
import shutil
import sys
import tomllib
from pathlib import Path

import pytest

from support.rendered import TEMPLATE, Prove, Result, run, run_task
from tools import PACKAGE
from tools.mutation.mutate import ACCEPTED, COPIED, FOLDERS, PYTEST_SETTINGS, copy_project

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="mutmut forks")

SOURCES = [path.relative_to(TEMPLATE) for path, _ in COPIED]
FUNCTION = "cancellation.cancellable_sleep"


def mutate(folder: Path, *arguments: str) -> Result:
    where = ("--folder", str(folder / "work"))
    return run_task("mutate", FUNCTION, *where, *arguments, check=False)


def test_every_mutant_of_a_small_function_is_noticed(tmp_path: Path, prove: Prove) -> None:
    result = mutate(tmp_path)
    assert result.returncode == 0, result.stdout
    assert re.search(rf"^{FUNCTION}: \d+ mutants .* 0 for none$", result.stdout, re.M)
    prove("functions whose mutants are all noticed", FUNCTION)


def replace(path: Path, right: str, wrong: str) -> None:
    text = path.read_text("utf-8")
    assert text.count(right) == 1
    path.write_text(text.replace(right, wrong), "utf-8")


def test_a_mutant_that_no_test_notices_is_named_and_is_an_error(tmp_path: Path) -> None:
    repository = tmp_path / "repository"
    for name in SOURCES:
        shutil.copytree(TEMPLATE / name, repository / name)
    asserted = "assert await cancellable_sleep(0, event) is True"
    tests = repository / "tests/runtime/test_cancellation.py"
    replace(tests, asserted, "await cancellable_sleep(0, event)")
    result = mutate(tmp_path, "--repository", str(repository))
    assert result.returncode == 1, result.stdout
    assert "cancellation: cancellable_sleep: return True -> return False" in result.stdout


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("task.uncancel() - cancelling_before", "0"),
        ("outside_cancellations = task.uncancel() - cancelling_before", "task.uncancel()"),
        ("pulling = None\n            yield item", "pass\n            yield item"),
        ("if _holds_a_result(pulling):", "if False:"),
    ],
    ids=["a count that stays", "another's is swallowed", "a stop in the body", "a lost result"],
)
def test_a_fault_in_what_the_iterator_is_careful_about_is_noticed(
    tmp_path: Path, right: str, wrong: str
) -> None:
    """Four faults by hand: all mutants of the iterator would take minutes."""
    copy_project(TEMPLATE, tmp_path)
    (tmp_path / "pyproject.toml").write_text(PYTEST_SETTINGS)
    replace(tmp_path / "src/runtime/cancellation.py", right, wrong)
    tests = ["-x", "-p", "no:cacheprovider", "tests/runtime/test_cancellation.py"]
    result = run(sys.executable, "-m", "pytest", *tests, cwd=tmp_path, check=False)
    assert result.returncode == 1, result.stdout
    assert re.search(r"^FAILED tests/runtime/test_cancellation\.py::", result.stdout, re.M)


def test_each_survivor_has_one_reason_and_none_is_in_cancellation_py() -> None:
    accepted = tomllib.loads(ACCEPTED.read_text("utf-8"))["accepted"]
    mutants = [mutant for group in accepted for mutant in group["mutants"]]
    assert len(mutants) == len(set(mutants))
    assert all(group["reason"] for group in accepted)
    assert {mutant.partition(":")[0] for mutant in mutants} <= {"consumer", "sqlite"}


def test_each_survivor_is_a_mutant_of_the_code_as_it_is() -> None:
    accepted = tomllib.loads(ACCEPTED.read_text("utf-8"))["accepted"]
    for mutant in [mutant for group in accepted for mutant in group["mutants"]]:
        module, function, change = mutant.split(": ", 2)
        path = PACKAGE / f"runtime/{FOLDERS.get(module, '')}{module}.py"
        source = path.read_text("utf-8")
        body: list[ast.stmt] = ast.parse(source).body
        for name in function.split("."):
            named = [node for node in body if getattr(node, "name", "") == name]
            assert len(named) == 1, mutant
            [node] = named
            body = getattr(node, "body", [])
        text = " ".join((ast.get_source_segment(source, node) or "").split())
        assert change.partition(" -> ")[0] in text, mutant
