"""Renders with pytest-cookies, and prints at the end a summary of the proofs."""

import json
import os
import runpy
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, chdir, redirect_stdout
from functools import cache
from hashlib import sha256
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from cookiecutter import generate, hooks
from filelock import FileLock
from jinja2 import Environment

from support import repositories
from support.compiling import compiling_once
from support.dealing import dealt
from support.rendered import (
    BIN,
    PUBLIC_QUESTIONS,
    SPREAD,
    TEMPLATE,
    Combination,
    Prove,
    Render,
    Service,
    environment_of,
    run,
)
from tasks import requirements

pytest.register_assert_rewrite("harness")  # before it is imported, hence E402 below

from harness.servers import ServerMissing, rabbitmq, skip_without_server  # noqa: E402
from tools import kafka  # noqa: E402


def pytest_configure() -> None:
    """Where Maven is installed, Kafka can be installed too."""
    if shutil.which("mvn") and shutil.which("java"):
        os.environ.setdefault("CONSUMER_TEST_BROKER_COMMAND", kafka.command())


LONGEST = (
    "tests/test_suites.py::test_the_runtime",
    "tests/test_benchmarks.py::test_the_benchmarks_hold_a_figure",
    "tests/test_servers.py::test_the_runtime",
    "tests/test_chaos.py::test_a_cluster_whose",
    "tests/test_chaos.py::test_twenty",
)
"""Busy tests of more than a minute. Tests that wait as long start first already: see runtime/conftest.py."""


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    items[:] = dealt(items, [item.nodeid.startswith(LONGEST) for item in items], workers)


@pytest.fixture(scope="session", autouse=True)
def compiled_once() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Environment, "compile", compiling_once(Environment.compile))
        # The hook reads each file of the template.
        patch.setattr(generate, "is_binary", cache(generate.is_binary))
        yield


@pytest.fixture
def hooks_in_this_process() -> Iterator[None]:
    """The start of Python for each hook is most of the cost of a render: for a test that renders very often."""

    def run_here(script: str | Path, folder: str | Path = ".") -> None:
        with chdir(folder), redirect_stdout(StringIO()):
            runpy.run_path(str(script), run_name="__main__")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hooks, "run_script", run_here)
        yield


@pytest.fixture(scope="session")
def render(cookies_session: Any, tmp_path_factory: pytest.TempPathFactory) -> Render:
    """Render with these answers; the same answers give the same service, so a test must not change it.

    The workers of xdist share the renders, and each has its own copy.
    """
    services: dict[str, Service] = {}
    own = tmp_path_factory.mktemp("services")
    is_worker = "PYTEST_XDIST_WORKER" in os.environ
    shared = own.parent.parent / "services" if is_worker else own / "shared"
    shared.mkdir(exist_ok=True)

    def bake(**answers: str) -> Service:
        assert answers.keys() <= set(PUBLIC_QUESTIONS), "cookiecutter ignores unknown questions"
        key = sha256(json.dumps(sorted(answers.items())).encode()).hexdigest()[:16]
        if key not in services:
            with FileLock(shared / f"{key}.lock"):
                if not (shared / key).exists():
                    result = cookies_session.bake(extra_context=answers)
                    assert result.exit_code == 0, result.exception
                    result.project_path.parent.rename(shared / key)
            [path] = (shared / key).iterdir()
            about = json.loads((path / ".template-answers.json").read_text("utf-8"))
            services[key] = Service(path, about["answers"]["package_name"]).copy_to(own / key)
        return services[key]

    return bake


@pytest.fixture
def render_own(render: Render, tmp_path: Path) -> Render:
    """As `render`, for a test that changes the service."""
    return lambda **answers: render(**answers).copy_to(tmp_path)


@pytest.fixture(params=SPREAD, ids=str)
def combination(request: pytest.FixtureRequest) -> Combination:
    """Fewer than all combinations, in which every pair of answers occurs."""
    one: Combination = request.param
    return one


@pytest.fixture
def service(render: Render, combination: Combination) -> Service:
    return render(**combination.answers)


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with the template, for tests that do not change it."""
    return repositories.write_template(
        tmp_path_factory.mktemp("repository") / "cookiecutter-consumer"
    )


@pytest.fixture(scope="session")
def reviewers() -> Path:
    """The folder of checkov, bandit and others, in their own environment; their downloads are kept."""

    def make(environment: Path) -> None:
        run("uv", "venv", "--quiet", str(environment), cwd=TEMPLATE)
        install = ["uv", "pip", "install", "--quiet", "--python", str(environment / BIN / "python")]
        run(*install, *requirements("review"), cwd=TEMPLATE)

    return environment_of(requirements("review"), make) / BIN


@pytest.fixture
def rabbitmq_url(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Iterator[str]:
    """The URL of a real RabbitMQ: the one that CONSUMER_TEST_BROKER_URL names, or a private one."""
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)  # not the one that workers share
    with ExitStack() as running:
        try:
            server = running.enter_context(rabbitmq.shared(tmp_path_factory.mktemp("rabbitmq")))
        except ServerMissing as missing:
            skip_without_server(missing)
        yield server.url


@pytest.fixture
def prove(record_property: Callable[[str, object], None]) -> Prove:
    """Count something for the summary, if the test passes: ``prove("suites", "whole")``."""
    return record_property


def pytest_terminal_summary(terminalreporter: Any) -> None:
    proved: dict[str, Counter[str]] = {}
    for report in terminalreporter.stats.get("passed", []):
        for what, which in report.user_properties:
            proved.setdefault(what, Counter())[which] += 1
    skipped = [(report.longrepr[2], 1) for report in terminalreporter.stats.get("skipped", [])]
    terminalreporter.section("what was proved")
    for what, counts in sorted(proved.items()):
        terminalreporter.line(f"{what}: {counts.total()}")
        for which, count in sorted(counts.items()):
            terminalreporter.line(f"    {count} x {which}")
    terminalreporter.line(f"skipped here: {len(skipped)}")
