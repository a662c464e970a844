"""Every service passes its own tests, with nothing installed but what it declares."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from scaffold import servers_of

from support.rendered import CHOICES, Combination, Prove, Render, Result, Service, run

QUICK = ("-m", "not slow")
OF_THE_NAMES = (*QUICK, "-k", "handlers or deploy or test_drift or test_cli")
"""What is made of the names, and the program that has them; the runtime and its other tests know none."""
EVERYTHING = ("-m", "", "-n", "3")
"""Also the very slow tests; side by side, as most of them wait."""
WHOLE = ("-n", "2")
OF_TELEMETRY = ("-k", "test_probes or test_opentelemetry or test_prometheus")
LINKED = ("tests/runtime/test_opentelemetry.py", "-k", "published_here")


def run_suite(service: Service, *arguments: str, environment: Path, **variables: str) -> Result:
    command = ["python", "-X", "dev", "-m", "pytest", "-p", "no:cacheprovider", *arguments]
    # -X dev would also look for errors of C in each allocation, which is slow.
    return service.run(*command, environment=environment, PYTHONMALLOC="default", **variables)


def check_and_prove(result: Result, prove: Prove, broker: str, what: str) -> None:
    assert result.returncode == 0, result.stdout
    prove("services' own suites that passed", f"broker={broker}, {what}")
    for count, reason in re.findall(r"^SKIPPED \[(\d+)\] \S+ (.*)$", result.stdout, re.M):
        for _ in range(int(count)):
            prove("tests of services that skipped", f"broker={broker}: {reason}")


def test_its_own_suite_passes(service: Service, combination: Combination, prove: Prove) -> None:
    """All of it for each broker, and all but the slow tests for each other handler stub of each broker.

    Those trees come again with long names: all but the slow tests once more for each broker, else what sees the names.
    """
    broker, telemetry = combination["broker"], combination["telemetry"]
    first_stub, renamed = combination["handler_stub"] == "json", combination.names == "long"
    if renamed and not first_stub:
        result = run_suite(service, *OF_THE_NAMES, environment=service.environment())
        check_and_prove(result, prove, broker, "those that see its names")
    elif renamed or not first_stub:
        result = run_suite(service, *QUICK, environment=service.environment())
        check_and_prove(result, prove, broker, "without the slow tests")
    else:
        for server in servers_of(broker):
            arguments = (*EVERYTHING, *server.arguments)
            environment = service.environment()
            result = run_suite(service, *arguments, environment=environment, **server.variables)
            what = ", ".join(filter(None, [f"telemetry={telemetry}", "whole", server.what]))
            check_and_prove(result, prove, broker, what)


@pytest.mark.parametrize("telemetry", CHOICES["telemetry"])
def test_its_own_suite_passes_with_each_telemetry(
    render: Render, telemetry: str, prove: Prove
) -> None:
    """Its own tests, of which some need no broker's server; whole suites have met one telemetry for each broker."""
    service = render(broker="sqlite", telemetry=telemetry)
    result = run_suite(service, *WHOLE, *OF_TELEMETRY, environment=service.environment())
    check_and_prove(result, prove, "sqlite", f"telemetry={telemetry}, those of telemetry")


@pytest.mark.parametrize("broker", CHOICES["broker"])
def test_a_handlers_span_is_linked_to_its_publishers_on_each_broker(
    render: Render, broker: str, prove: Prove
) -> None:
    """The one test of telemetry that meets the broker, so not only for those whose whole suite had it."""
    service = render(broker=broker, telemetry="opentelemetry")
    variables = servers_of(broker)[0].variables
    result = run_suite(service, *LINKED, "-m", "", environment=service.environment(), **variables)
    check_and_prove(result, prove, broker, "telemetry=opentelemetry, spans and their links")


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


ON_UVLOOP = """
import uvloop

made = []

def new_event_loop():
    made.append(uvloop.new_event_loop())
    return made[-1]

def pytest_asyncio_loop_factories(config, item):
    return {"uvloop": new_event_loop}

def pytest_terminal_summary(terminalreporter):
    terminalreporter.write_line(f"loops of uvloop: {len(made)}")
"""


def test_the_cancellation_and_the_consumer_pass_their_tests_on_uvloop(
    render: Render, prove: Prove, tmp_path: Path
) -> None:
    service = render(broker="sqlite")
    environment = service.environment()
    install = ("uv", "pip", "install", "--quiet", "--python", sys.executable, "--target", "uvloop")
    run(*install, "uvloop>=0.22,<1", cwd=tmp_path)
    (tmp_path / "uvloop/on_uvloop.py").write_text(ON_UVLOOP)
    path = os.pathsep.join(["src", str(tmp_path / "uvloop")])
    tested = [f"tests/runtime/test_{name}.py" for name in ("cancellation", "consumer", "signals")]
    arguments = (*QUICK, "-p", "on_uvloop", *tested)
    result = run_suite(service, *arguments, environment=environment, PYTHONPATH=path)
    [loops] = re.findall(r"^loops of uvloop: (\d+)$", result.stdout, re.M)
    assert int(loops) > 100
    check_and_prove(result, prove, "sqlite", "those of the iterator and the consumer, on uvloop")


def other_pythons() -> list[Any]:
    """Every other that a service may run on: all of the suite on the newest, the rest without the slow tests."""
    minors = [minor for minor in range(11, 15) if minor != sys.version_info.minor]
    found = {minor: find_python(minor) for minor in minors}
    newest = max((minor for minor, python in found.items() if python), default=None)
    parameters = []
    for minor, python in found.items():
        reason = f"Python 3.{minor} is not installed"
        marks = [] if python else [pytest.mark.skip(reason=reason)]
        whole = minor == newest
        parameters.append(pytest.param(python, whole, id=f"python=3.{minor}", marks=marks))
    return parameters


def find_python(minor: int) -> str | None:
    candidates = [
        *filter(None, [shutil.which(f"python3.{minor}")]),
        *map(str, Path.home().glob(f".pyenv/versions/3.{minor}.*/bin/python")),
    ]
    for python in reversed(candidates):
        if subprocess.run([python, "-c", ""], stderr=subprocess.DEVNULL).returncode == 0:
            return python
    return None


@pytest.mark.parametrize(("python", "whole"), other_pythons())
def test_its_own_suite_passes_on_other_pythons(
    render: Render, prove: Prove, python: str, whole: bool
) -> None:
    service = render()
    environment = service.environment(python=python)
    version = service.run("python", "--version", environment=environment).stdout.strip()
    result = run_suite(service, *(WHOLE if whole else QUICK), environment=environment)
    what = "whole" if whole else "without the slow tests"
    check_and_prove(result, prove, "rabbitmq", f"{what}, on {version}")


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
