"""Every service passes its own tests with only its declared dependencies, and so does the runtime in place.

Every run of pytest here includes the runtime's tests in place, on this Python and the newest dependencies. Here
they also run on the other Pythons, and with the oldest versions: a service's own lock may choose any of these.
"""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from support.rendered import (
    BIN,
    QUESTIONS,
    TEMPLATE,
    TREE,
    Combination,
    Prove,
    Render,
    Result,
    Service,
    environment_of,
    run,
)
from tasks import requirements
from tools.servers import roots

IN_PLACE = ("tests/runtime", f"{TREE.name}/tests/runtime")
QUICK = ("-m", "not slow")
CLIENTS = {
    broker: [re.split(r"[\[>]", one)[0] for one in about["dependencies"]]
    for broker, about in QUESTIONS["_brokers"].items()
}
"""The libraries of each broker."""
OF_CLIENTS = ("connecting", "unresponsive")
OF_LIBRARIES = (
    *("bad_input", "cli", "consumer", "foreign", "handlers", "logs", "opentelemetry", "process"),
    *("prometheus", "rehearse", "settings"),
)


class Suite:
    """Runs pytest, checks that it passes, and counts it for the summary."""

    def __init__(self, prove: Prove) -> None:
        self.prove = prove

    def of_service(self, service: Service, what: str, *arguments: str, **variables: str) -> Result:
        command = ["python", "-X", "dev", "-m", "pytest", "-p", "no:cacheprovider", *arguments]
        began_at = time.monotonic()
        # -X dev would also check each allocation in C, which is slow.
        result = service.run(
            *command, environment=service.environment(), PYTHONMALLOC="default", **variables
        )
        self._check(result, "services' own suites that passed", what, began_at)
        return result

    def quick_in_place(
        self, environment: Path, what: str, *files: str, before: Sequence[str]
    ) -> None:
        quick = ("-m", "not slow and not very_slow")
        self.in_place(environment, f"{what}, without the slow tests", *quick, *files, before=before)

    def in_place(
        self,
        environment: Path,
        what: str,
        *arguments: str,
        before: Sequence[str] = (),
        **variables: str,
    ) -> Result:
        """Without tests/conftest.py, whose fixtures need packages that no service has."""
        command = [*before, str(environment / BIN / "python"), "-X", "dev", "-m", "pytest"]
        command += ["-p", "no:cacheprovider", "-c", "pyproject.toml", "--rootdir=."]
        command += ["--confcutdir=tests/runtime", "-n", "2", "--timeout=120", *arguments]
        began_at = time.monotonic()
        env = {"PYTHONMALLOC": "default", **variables}
        result = run(*command, cwd=TEMPLATE, check=False, env=env)
        self._check(result, "runs of the runtime's tests that passed", what, began_at)
        return result

    def _check(self, result: Result, title: str, what: str, began_at: float) -> None:
        assert result.returncode == 0, result.stdout
        self.prove(title, f"{what}: {time.monotonic() - began_at:.0f} s")
        for count, reason in re.findall(r"^SKIPPED \[(\d+)\] \S+ (.*)$", result.stdout, re.M):
            for _ in range(int(count)):
                self.prove("tests that these skipped", reason)


@pytest.fixture
def suite(prove: Prove) -> Suite:
    return Suite(prove)


# -- services


def test_its_own_suite_passes(service: Service, combination: Combination, suite: Suite) -> None:
    """All of it once for each broker, on a real server; for every other service, all except the slow tests.

    The vendored tests have the same bytes in all services of one broker: see test_render.py.
    """
    broker = combination["broker"]
    if combination["handler_stub"] == "json" and combination.names == "short":
        suite.of_service(service, f"broker={broker}, whole", "-n", "2")
    else:
        suite.of_service(service, f"broker={broker}, without the slow tests", *QUICK)


@pytest.mark.parametrize("dependency", ["aio-pika", "pydantic-settings", "structlog"])
def test_a_dependency_that_is_not_declared_is_seen(render_own: Render, dependency: str) -> None:
    """Otherwise the test above would pass for a service that starts on this machine only."""
    service = render_own(broker="rabbitmq")
    declared = service.read("pyproject.toml")
    without = re.sub(rf'    "{dependency}[>=].*\n', "", declared)
    assert without != declared
    service.write("pyproject.toml", without)
    result = service.run(
        *("python", "-m", service.package, "check"),
        environment=service.environment(),
        CONSUMER_BROKER_URL="amqp://127.0.0.1:1/",
    )
    assert result.returncode != 0
    module = dependency.replace("-", "_")
    assert f"ModuleNotFoundError: No module named '{module}'" in result.stdout


# -- the runtime in place


@dataclass(frozen=True)
class Python:
    """An interpreter of this machine, or of a root beside it."""

    version: tuple[int, ...]
    path: str
    root: Path | None = None

    def __str__(self) -> str:
        return f"python={'.'.join(map(str, self.version))}"


@cache
def pythons() -> list[Python]:
    """One of each release of CPython from 3.11 on this machine, including the system's, in their order."""
    folders = [*Path.home().glob(".pyenv/versions/*/bin"), os.environ["PATH"], "/usr/bin"]
    env = {**os.environ, "PATH": os.pathsep.join(map(str, folders))}
    command = ("uv", "python", "list", "--only-installed", "--output-format=json", ">=3.11,<3.15")
    listed = json.loads(subprocess.run(command, env=env, check=True, capture_output=True).stdout)
    found = {
        tuple(map(int, one["version"].split("."))): one["path"]
        for one in reversed(listed)  # the first one of each release wins
        if (one["implementation"], one["variant"]) == ("cpython", "default")
        and one["version"].replace(".", "").isdecimal()
    }
    found[sys.version_info[:3]] = sys.executable
    here = [Python(version, path) for version, path in sorted(found.items())]
    root = roots.there("sid", ["python3.14"])
    if root and here[-1].version < (3, 14):
        here.append(Python((3, 14), "/usr/bin/python3.14", root))
    return here


def of_other_minors() -> list[Any]:
    newest = {python.version[1]: python for python in pythons()}
    found: list[Any] = []
    for minor in sorted({11, 12, 13, 14} - {sys.version_info.minor}):
        reason = (
            f"Python 3.{minor} is not installed; `python3 tasks.py servers python3.14` gets that"
        )
        missing = pytest.param(None, id=f"python=3.{minor}", marks=pytest.mark.skip(reason=reason))
        found.append(newest.get(minor, missing))
    return found


@pytest.fixture
def before(python: Python) -> Iterator[list[str]]:
    """The words before a command that runs with the /usr of this Python's root; none without one."""
    if python.root is None:
        yield []
    else:
        with roots.beside(python.root, {}) as words:
            yield [*words, "inside"]


def runtime_environment(
    python: str = sys.executable, resolution: str = "highest", before: Sequence[str] = ()
) -> Path:
    """An environment with every dependency of the runtime and of its tests, and nothing else."""
    needed = [*requirements("service"), *requirements("harness")]

    def make(environment: Path) -> None:
        run(*before, "uv", "venv", "--quiet", "--python", python, str(environment), cwd=TEMPLATE)
        install = (
            *before,
            "uv",
            "pip",
            "install",
            "--quiet",
            "--python",
            str(environment / BIN / "python"),
        )
        run(*install, "--resolution", resolution, *needed, cwd=TEMPLATE)

    return environment_of([*needed, str(Path(python).resolve()), resolution], make)


def environment_on(
    python: Python, resolution: str, before: Sequence[str], what: str
) -> tuple[Path, str]:
    """The environment and its Python, with the version that the interpreter itself reports."""
    environment = runtime_environment(python.path, resolution, before)
    command = (*before, str(environment / BIN / "python"), "--version")
    version = run(*command, cwd=TEMPLATE).stdout.strip()
    assert version.startswith(str(python).replace("python=", "Python "))
    return environment, f"on {version}, with the {what} dependencies"


@pytest.mark.parametrize("python", of_other_minors(), ids=str)
def test_the_runtime_passes_its_tests_on_other_pythons(
    suite: Suite, python: Python, before: list[str]
) -> None:
    """All except the slow tests, and the contract on the default broker."""
    environment, what = environment_on(python, "highest", before, "newest")
    suite.quick_in_place(environment, what, *IN_PLACE, before=before)
    if python.root is None:
        arguments = (f"{IN_PLACE[1]}/test_contract.py", "-k", "rabbitmq")
        suite.in_place(environment, f"{what}, the contract on RabbitMQ", *arguments)
        # Each Python accepts connections differently: see runtime/probes.py.
        arguments = ("tests/runtime/test_probes.py", "-k", "thousands_of_idle")
        suite.in_place(environment, f"{what}, 5,500 clients of the probe port", *arguments)


@pytest.mark.parametrize("python", sorted({pythons()[0], pythons()[-1]}, key=str), ids=str)
def test_the_runtime_passes_its_tests_with_the_oldest_dependencies(
    suite: Suite, python: Python, before: list[str]
) -> None:
    """On the first Python of this machine, whose faults no later one has, all except the slow tests.

    There also the tests of each broker whose oldest client is not the newest. On the last Python the tests that depend
    on a library: it has passed the others with the newest versions.
    """
    environment, what = environment_on(python, "lowest-direct", before, "oldest")
    first = python == pythons()[0]
    where = IN_PLACE if first else [f"tests/runtime/test_{name}.py" for name in OF_LIBRARIES]
    suite.quick_in_place(environment, what, *where, before=before)
    for broker, dependencies in CLIENTS.items():
        if first and (older := versions(environment, dependencies)):
            files = [f"{IN_PLACE[1]}/test_contract.py", f"{IN_PLACE[1]}/test_outage.py"]
            files += [f"tests/runtime/test_{name}.py" for name in (broker, *OF_CLIENTS)]
            suite.in_place(
                environment,
                f"{what}, {broker} with {older}",
                *("-m", "not very_slow", "-k", broker, *files),
                before=before,
            )


def versions(environment: Path, names: Sequence[str]) -> str:
    """The versions of the libraries whose version there is not the version here, which is the newest."""
    [packages] = environment.glob("lib/*/site-packages")
    found = {one.name: one.version for one in metadata.distributions(path=[str(packages)])}
    return ", ".join(
        f"{name} {found[name]}" for name in names if found[name] != metadata.version(name)
    )


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
    suite: Suite, tmp_path: Path
) -> None:
    install = ("uv", "pip", "install", "--quiet", "--python", sys.executable, "--target", "uvloop")
    run(*install, "uvloop>=0.22,<1", cwd=tmp_path)
    (tmp_path / "uvloop/on_uvloop.py").write_text(ON_UVLOOP)
    files = [f"tests/runtime/test_{name}.py" for name in ("cancellation", "consumer", "signals")]
    arguments = ("-n", "0", *QUICK, "-p", "on_uvloop", *files)
    variables = {"PYTHONPATH": str(tmp_path / "uvloop")}
    result = suite.in_place(runtime_environment(), "on uvloop", *arguments, **variables)
    [loops] = re.findall(r"^loops of uvloop: (\d+)$", result.stdout, re.M)
    assert int(loops) > 100
