"""Every service passes its own tests, with nothing installed but what it declares."""

import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from conftest import Prove, Render
from rendered import Combination, Result, Service

EVERYTHING = ["-m", ""]
WHOLE: list[str] = []
QUICK = ["-m", "not slow"]


def run_suite(service: Service, broker_url: str, *arguments: str, environment: Path) -> Result:
    return service.run(
        "python", "-X", "dev", "-m", "pytest", "-p", "no:cacheprovider", *arguments,
        environment=environment, CONSUMER_TEST_BROKER_URL=broker_url,
    )  # fmt: skip


def check_and_prove(result: Result, prove: Prove, broker: str, what: str) -> None:
    assert result.returncode == 0, result.stdout
    prove("services' own suites that passed", f"broker={broker}, {what}")
    for count, reason in re.findall(r"^SKIPPED \[(\d+)\] \S+ (.*)$", result.stdout, re.M):
        for _ in range(int(count)):
            prove("tests of services that skipped", f"broker={broker}: {reason}")


def extent(combination: Combination) -> tuple[str, list[str]]:
    """How much of a suite runs: all of it somewhere, the slow tests for each broker and stub.

    For the rest the quick ones will do: the runtime and its tests are the same for all.
    """
    if combination.names != "short" or combination.handlers != "two":
        return "without the slow tests", QUICK
    if combination.handler_stub != "json":
        return "whole", WHOLE
    return "with the very slow tests", EVERYTHING


def test_its_own_suite_passes(
    service: Service, combination: Combination, rabbitmq_url: str, prove: Prove
) -> None:
    what, arguments = extent(combination)
    result = run_suite(service, rabbitmq_url, *arguments, environment=service.environment())
    check_and_prove(result, prove, combination.broker, what)


def other_pythons() -> list[Any]:
    """Every other Python that a service may run on, skipped where it is not installed."""
    parameters = []
    for minor in range(11, 15):
        if minor != sys.version_info.minor:
            found = [
                *filter(None, [shutil.which(f"python3.{minor}")]),
                *map(str, Path.home().glob(f".pyenv/versions/3.{minor}.*/bin/python")),
            ]
            reason = f"Python 3.{minor} is not installed"
            marks = [] if found else [pytest.mark.skip(reason=reason)]
            parameters.append(pytest.param(found[-1:], id=f"python=3.{minor}", marks=marks))
    return parameters


@pytest.mark.parametrize("python", other_pythons())
def test_its_own_suite_passes_on_other_pythons(
    render: Render, rabbitmq_url: str, prove: Prove, python: list[str]
) -> None:
    service = render()
    environment = service.environment(python=python[0])
    version = service.run("python", "--version", environment=environment).stdout.strip()
    result = run_suite(service, rabbitmq_url, environment=environment)
    check_and_prove(result, prove, "rabbitmq", f"whole, on {version}")


def test_its_own_suite_passes_with_the_oldest_dependencies_that_it_allows(
    render: Render, rabbitmq_url: str, prove: Prove
) -> None:
    service = render()
    environment = service.environment(resolution="lowest-direct")
    result = run_suite(service, rabbitmq_url, environment=environment)
    check_and_prove(result, prove, "rabbitmq", "whole, with the oldest dependencies")


@pytest.mark.parametrize("dependency", ["aio-pika", "pydantic-settings", "structlog"])
def test_a_dependency_that_is_not_declared_is_seen(
    render_own: Render, rabbitmq_url: str, dependency: str
) -> None:
    """Or the tests above would pass for a service that nobody else can start."""
    service = render_own(broker="rabbitmq")
    declared = service.read("pyproject.toml")
    without = re.sub(rf'    "{dependency}[>=].*\n', "", declared)
    assert without != declared
    service.write("pyproject.toml", without)
    result = run_suite(service, rabbitmq_url, *QUICK, environment=service.environment())
    assert result.returncode != 0
    module = dependency.replace("-", "_")
    assert f"ModuleNotFoundError: No module named '{module}'" in result.stdout
