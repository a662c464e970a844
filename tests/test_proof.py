"""The mutation check goes red when a test is missing, and its list of survivors says no more than it must.

The long form is ``python3 tasks.py mutate``; docs/proof.md says what it found.
"""

import re
import sys
import tomllib
from pathlib import Path

import pytest

from conftest import Prove, Render
from rendered import TEMPLATE, Result, Service, run_task

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="mutmut forks")

FUNCTION = "cancellation.cancellable_sleep"


def mutate(service: Service, folder: Path) -> Result:
    where = ("--service", str(service.path), "--folder", str(folder))
    return run_task("mutate", FUNCTION, *where, caches=folder, check=False)


def test_every_mutant_of_a_small_function_is_noticed(
    render: Render, tmp_path: Path, prove: Prove
) -> None:
    result = mutate(render(broker="sqlite"), tmp_path)
    assert result.returncode == 0, result.stdout
    assert re.search(rf"^{FUNCTION}: \d+ mutants .* 0 for none$", result.stdout, re.M)
    prove("functions whose mutants are all noticed", FUNCTION)


def test_a_mutant_that_no_test_notices_is_named_and_is_an_error(
    render_own: Render, tmp_path: Path
) -> None:
    service = render_own(broker="sqlite")
    name = "tests/runtime/test_cancellation.py"
    asked = "assert await cancellable_sleep(0, event) is True"
    unknowing = service.read(name).replace(asked, "await cancellable_sleep(0, event)")
    assert unknowing != service.read(name)
    service.write(name, unknowing)
    result = mutate(service, tmp_path)
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
def test_what_the_iterator_is_careful_about_is_noticed_when_it_is_missing(
    render_own: Render, right: str, wrong: str
) -> None:
    """All of its mutants would take minutes here."""
    service = render_own(broker="sqlite")
    name = "src/order_events/runtime/cancellation.py"
    original = service.read(name)
    assert original.count(right) == 1
    service.write(name, original.replace(right, wrong))
    tests = ["-x", "-p", "no:cacheprovider", "tests/runtime/test_cancellation.py"]
    result = service.run("python", "-m", "pytest", *tests, environment=service.environment())
    assert result.returncode == 1, result.stdout
    assert re.search(r"^FAILED tests/runtime/test_cancellation\.py::", result.stdout, re.M)


def test_each_survivor_has_one_reason_and_none_is_in_cancellation_py() -> None:
    accepted = tomllib.loads((TEMPLATE / "proof/survivors.toml").read_text("utf-8"))["accepted"]
    mutants = [mutant for group in accepted for mutant in group["mutants"]]
    assert len(mutants) == len(set(mutants))
    assert all(group["reason"] for group in accepted)
    assert {mutant.partition(":")[0] for mutant in mutants} <= {"consumer", "sqlite"}
