"""Every service passes its own tests with only its declared dependencies; and the runtime's tests pass on every Python.

The whole suite of a service runs once for each broker. Its other trees differ in their handlers, names and deployment
only: they run their quick tests.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from support.rendered import (
    BIN,
    CHOICES,
    ENVIRONMENTS,
    TEMPLATE,
    TREE,
    Combination,
    Prove,
    Render,
    Result,
    Service,
    run,
)
from tasks import PYTHON_PATH, requirements
from tools.kafka import KafkaMissing, variables

RUNTIME_TESTS = TEMPLATE / "tests/runtime"
CONTRACT = TREE / "tests/runtime"
QUICK = ("-m", "not slow")
WHOLE = ("-n", "3")
"""Side by side, since most tests wait."""


def run_suite(service: Service, *arguments: str, environment: Path, **variables: str) -> Result:
    command = ["python", "-X", "dev", "-m", "pytest", "-p", "no:cacheprovider", *arguments]
    # -X dev would also look for errors of C in each allocation, which is slow.
    return service.run(*command, environment=environment, PYTHONMALLOC="default", **variables)


def check_and_prove(result: Result, prove: Prove, what: str) -> None:
    assert result.returncode == 0, result.stdout
    prove("suites that passed", what)
    for count, reason in re.findall(r"^SKIPPED \[(\d+)\] \S+ (.*)$", result.stdout, re.M):
        for _ in range(int(count)):
            prove("tests of suites that skipped", f"{what}: {reason}")


@pytest.mark.parametrize("broker", CHOICES["broker"])
def test_its_own_whole_suite_passes_on_each_broker(
    render: Render, broker: str, prove: Prove
) -> None:
    telemetry = CHOICES["telemetry"][CHOICES["broker"].index(broker) % len(CHOICES["telemetry"])]
    service = render(broker=broker, telemetry=telemetry)
    # SQS's emulator is too slow for two tests at once: leases of a second expire meanwhile.
    arguments = ("-n", "0") if broker == "sqs" else WHOLE
    server = kafka() if broker == "kafka" else {}
    result = run_suite(service, *arguments, environment=service.environment(), **server)
    check_and_prove(result, prove, f"broker={broker}, telemetry={telemetry}")


def kafka() -> dict[str, str]:
    if "CONSUMER_TEST_BROKER_COMMAND" in os.environ:
        name = "CONSUMER_TEST_BROKER_COMMAND"
        return {name: os.environ[name]}
    try:
        return variables()
    except KafkaMissing:
        return {}  # the suite skips, or fails with REQUIRE_BROKERS=1


def test_its_quick_tests_pass(service: Service, combination: Combination, prove: Prove) -> None:
    result = run_suite(service, *QUICK, environment=service.environment())
    check_and_prove(result, prove, f"quick, broker={combination['broker']}")


@pytest.mark.parametrize("dependency", ["aio-pika", "pydantic-settings", "structlog"])
def test_a_dependency_that_is_not_declared_is_seen(render_own: Render, dependency: str) -> None:
    """Or the tests above would pass for a service that cannot be started elsewhere."""
    service = render_own(broker="rabbitmq")
    declared = service.read("pyproject.toml")
    without = re.sub(rf'    "{dependency}[>=].*\n', "", declared)
    assert without != declared
    service.write("pyproject.toml", without)
    result = run_suite(service, environment=service.environment())
    assert result.returncode != 0
    module = dependency.replace("-", "_")
    assert f"ModuleNotFoundError: No module named '{module}'" in result.stdout


# -- the runtime's own tests, where they lie


def environment_of(python: str, resolution: str) -> Path:
    """A virtual environment for tests/runtime, with this resolution of the services' dependencies; kept for the next run."""
    found = subprocess.run([python, "--version"], capture_output=True, text=True, check=True)
    environment = ENVIRONMENTS / f"{found.stdout.strip().replace(' ', '-')}-{resolution}"
    stamp = environment / ".installed"
    wanted = "\n".join([*requirements("service"), *requirements("harness")])
    if not stamp.exists() or stamp.read_text(encoding="utf-8") != wanted:
        uv("venv", "--clear", "--python", python, str(environment))
        install = ("pip", "install", "--python", str(environment))
        uv(*install, "--resolution", resolution, *requirements("service"))
        chosen = run("uv", "--quiet", "pip", "freeze", "--python", str(environment), cwd=TEMPLATE).stdout
        (environment / "chosen.txt").write_text(chosen, encoding="utf-8")
        uv(*install, "--constraints", str(environment / "chosen.txt"), *requirements("harness"))
        stamp.write_text(wanted, encoding="utf-8")
    return environment


def uv(*arguments: str) -> None:
    run("uv", "--quiet", *arguments, cwd=TEMPLATE)


def run_in_place(environment: Path, folder: Path, *arguments: str, **variables: str) -> Result:
    """The tests of the folder in this environment, with the options of the template's pytest."""
    path = os.pathsep.join(
        [*map(str, PYTHON_PATH), *filter(None, [variables.pop("PYTHONPATH", "")])]
    )
    command = [str(environment / BIN / "python"), "-X", "dev", "-m", "pytest", "-n", "2"]
    # Without tests/conftest.py, which needs cookiecutter.
    return run(
        *(*command, "-p", "no:cacheprovider", f"--confcutdir={folder}", *arguments, str(folder)),
        cwd=TEMPLATE,
        check=False,
        env={"PYTHONPATH": path, "PYTHONMALLOC": "default", **variables},
    )


def pythons() -> list[Any]:
    """Every Python that a service may run on, with the lowest and with the newest versions of all dependencies."""
    rows = []
    for minor in range(11, 15):
        python = find_python(minor)
        marks = [] if python else [pytest.mark.skip(reason=f"Python 3.{minor} is not installed")]
        for resolution in ("lowest-direct", "highest"):
            name = f"python=3.{minor}, {resolution}"
            rows.append(pytest.param(python, resolution, id=name, marks=marks))
    return rows


def find_python(minor: int) -> str | None:
    candidates = [
        *filter(None, [shutil.which(f"python3.{minor}")]),
        *map(str, Path.home().glob(f".pyenv/versions/3.{minor}.*/bin/python")),
    ]
    for python in reversed(candidates):
        if subprocess.run([python, "-c", ""], stderr=subprocess.DEVNULL).returncode == 0:
            return python
    return None


@pytest.mark.parametrize(("python", "resolution"), pythons())
def test_the_runtime_passes_its_tests_on_every_python(
    prove: Prove, python: str, resolution: str
) -> None:
    """Without the tests that need a broker's server: these run on this Python, and with the lowest versions below."""
    environment = environment_of(python, resolution)
    result = run_in_place(environment, RUNTIME_TESTS, *QUICK)
    check_and_prove(result, prove, f"the runtime, {environment.name}")


def test_every_broker_keeps_the_contract_with_the_lowest_versions(prove: Prove) -> None:
    environment = environment_of(sys.executable, "lowest-direct")
    result = run_in_place(environment, CONTRACT, "-k", "test_contract", **kafka())
    check_and_prove(result, prove, f"the contract, {environment.name}")


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
    prove: Prove, tmp_path: Path
) -> None:
    environment = environment_of(sys.executable, "highest")
    python = str(environment / BIN / "python")
    install = ("pip", "install", "--python", python, "--target", str(tmp_path), "uvloop>=0.22,<1")
    uv(*install)
    (tmp_path / "on_uvloop.py").write_text(ON_UVLOOP)
    tested = ("-k", "test_cancellation or test_consumer or test_signals")
    arguments = (*QUICK, "-p", "on_uvloop", "-n", "0", *tested)
    result = run_in_place(environment, RUNTIME_TESTS, *arguments, PYTHONPATH=str(tmp_path))
    loops = re.findall(r"^loops of uvloop: (\d+)$", result.stdout, re.M)
    assert int(loops[0]) > 100, result.stdout
    check_and_prove(result, prove, "the runtime, on uvloop")
