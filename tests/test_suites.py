"""Every service passes its own tests, with nothing installed but what it declares."""

import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from conftest import Prove, Render
from rendered import COMBINATIONS, Combination, Result, Service

QUICK = ("-m", "not slow")
EVERYTHING = ("-m", "", "-n", "2")
"""Also the very slow tests; side by side, as most of them wait."""
WHOLE = ("-n", "2")


def run_suite(service: Service, *arguments: str, environment: Path) -> Result:
    command = ["python", "-X", "dev", "-m", "pytest", "-p", "no:cacheprovider", *arguments]
    return service.run(*command, environment=environment)


def check_and_prove(result: Result, prove: Prove, broker: str, what: str) -> None:
    assert result.returncode == 0, result.stdout
    prove("services' own suites that passed", f"broker={broker}, {what}")
    for count, reason in re.findall(r"^SKIPPED \[(\d+)\] \S+ (.*)$", result.stdout, re.M):
        for _ in range(int(count)):
            prove("tests of services that skipped", f"broker={broker}: {reason}")


def test_its_own_suite_passes(service: Service, combination: Combination, prove: Prove) -> None:
    """All of it for each broker; without the slow tests for the rest, which differ in nothing that these see.

    Of one broker with several telemetries, all but the first go without the very slow tests.
    """
    arguments, what = QUICK, "without the slow tests"
    if (combination.handler_stub, combination.names) == ("json", "short"):
        first = next(one for one in COMBINATIONS if one.broker == combination.broker)
        arguments, what = (
            (EVERYTHING, "with the very slow tests") if combination == first else (WHOLE, "whole")
        )
    result = run_suite(service, *arguments, environment=service.environment())
    what = f"telemetry={combination.telemetry}, {what}"
    check_and_prove(result, prove, combination.broker, what)


def test_the_tests_of_the_runtime_see_nothing_that_differs_between_services_of_one_broker(
    service: Service, combination: Combination, render: Render
) -> None:
    other = render(**{**combination.answers, "handler_stub": "json"})
    runtime, others_runtime = (
        {name: text for name, text in one.files.items() if name.startswith("tests/runtime/")}
        for one in (service, other)
    )
    assert runtime == others_runtime
    imports = re.compile(rb"^ *(?:from|import) %b(\S*)" % service.package.encode(), re.M)
    seen = {module for text in runtime.values() for module in imports.findall(text)}
    assert {module.split(b".")[1] for module in seen} == {b"runtime"}


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
    render: Render, prove: Prove, python: list[str]
) -> None:
    service = render()
    environment = service.environment(python=python[0])
    version = service.run("python", "--version", environment=environment).stdout.strip()
    result = run_suite(service, *WHOLE, environment=environment)
    check_and_prove(result, prove, "rabbitmq", f"whole, on {version}")


def test_its_own_suite_passes_with_the_oldest_dependencies_that_it_allows(
    render: Render, prove: Prove
) -> None:
    service = render()
    environment = service.environment(resolution="lowest-direct")
    result = run_suite(service, *WHOLE, environment=environment)
    check_and_prove(result, prove, "rabbitmq", "whole, with the oldest dependencies")


@pytest.mark.parametrize("dependency", ["aio-pika", "pydantic-settings", "structlog"])
def test_a_dependency_that_is_not_declared_is_seen(render_own: Render, dependency: str) -> None:
    """Or the tests above would pass for a service that nobody else can start."""
    service = render_own(broker="rabbitmq")
    declared = service.read("pyproject.toml")
    without = re.sub(rf'    "{dependency}[>=].*\n', "", declared)
    assert without != declared
    service.write("pyproject.toml", without)
    result = run_suite(service, *QUICK, environment=service.environment())
    assert result.returncode != 0
    module = dependency.replace("-", "_")
    assert f"ModuleNotFoundError: No module named '{module}'" in result.stdout
