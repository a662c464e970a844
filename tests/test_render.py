"""Every combination of answers gives a complete service that is formatted, linted, typed and its own."""

import json
import re
import shutil
from functools import cache, cached_property
from itertools import chain, combinations, product
from pathlib import Path
from typing import Any

import pytest

from support.rendered import (
    CHOICES,
    QUESTIONS,
    SPREAD,
    TREE,
    Combination,
    Prove,
    Render,
    Service,
    every_combination,
)

# Every file of every service, for any answers; {package} stands for its package.
ALWAYS = [
    ".env.example",
    ".gitattributes",
    ".gitignore",
    ".template-answers.json",
    "README.md",
    "pyproject.toml",
    "src/{package}/__init__.py",
    "src/{package}/__main__.py",
    "src/{package}/handlers/__init__.py",
    "src/{package}/py.typed",
    "src/{package}/runtime/MANIFEST.sha256",
    "src/{package}/runtime/__init__.py",
    "src/{package}/runtime/brokers/__init__.py",
    "src/{package}/runtime/brokers/buffer.py",
    "src/{package}/runtime/brokers/connectivity.py",
    "src/{package}/runtime/brokers/dead_letters.py",
    "src/{package}/runtime/brokers/delivery.py",
    "src/{package}/runtime/brokers/put_off.py",
    "src/{package}/runtime/brokers/requests.py",
    "src/{package}/runtime/brokers/several.py",
    "src/{package}/runtime/brokers/source.py",
    "src/{package}/runtime/brokers/sqlite.py",
    "src/{package}/runtime/brokers/url.py",
    "src/{package}/runtime/cancellation.py",
    "src/{package}/runtime/consumer.py",
    "src/{package}/runtime/errors.py",
    "src/{package}/runtime/formats.py",
    "src/{package}/runtime/handlers.py",
    "src/{package}/runtime/limits.py",
    "src/{package}/runtime/logs.py",
    "src/{package}/runtime/message.py",
    "src/{package}/runtime/operate/__init__.py",
    "src/{package}/runtime/operate/browse.html",
    "src/{package}/runtime/operate/browse.py",
    "src/{package}/runtime/operate/cli.py",
    "src/{package}/runtime/operate/console.py",
    "src/{package}/runtime/operate/demo.py",
    "src/{package}/runtime/operate/letters.py",
    "src/{package}/runtime/operate/rehearse.py",
    "src/{package}/runtime/operate/reload.py",
    "src/{package}/runtime/operate/timeline.py",
    "src/{package}/runtime/operate/trial.py",
    "src/{package}/runtime/operate/vendored.py",
    "src/{package}/runtime/ordering.py",
    "src/{package}/runtime/pause.py",
    "src/{package}/runtime/probes.py",
    "src/{package}/runtime/publishing.py",
    "src/{package}/runtime/receipt.py",
    "src/{package}/runtime/redaction.py",
    "src/{package}/runtime/service.py",
    "src/{package}/runtime/settings.py",
    "src/{package}/runtime/signals.py",
    "src/{package}/runtime/suspects.py",
    "src/{package}/runtime/telemetry/__init__.py",
    "src/{package}/runtime/testing.py",
    "src/{package}/runtime/watchdog.py",
    "src/{package}/settings.py",
    "tests/__init__.py",
    "tests/conftest.py",
    "tests/handlers/__init__.py",
    "tests/runtime/__init__.py",
    "tests/runtime/conftest.py",
    "tests/runtime/harness/__init__.py",
    "tests/runtime/harness/contract.py",
    "tests/runtime/harness/fixtures.py",
    "tests/runtime/harness/process.py",
    "tests/runtime/harness/scene.py",
    "tests/runtime/harness/servers/__init__.py",
    "tests/runtime/harness/servers/local.py",
    "tests/runtime/harness/service.py",
    "tests/runtime/test_contract.py",
    "tests/runtime/test_drift.py",
    "tests/runtime/test_outage.py",
    "tests/runtime/test_shutdown.py",
    "tests/test_rehearsal.py",
    "tools/handler.stub",
    "tools/new_handler.py",
    "tools/test_handler.stub",
    "tools/update.py",
]
OF_A_HANDLER = ["src/{package}/handlers/{handler}.py", "tests/handlers/test_{handler}.py"]

OWNER = re.compile(
    rf"# cookiecutter-consumer {re.escape(QUESTIONS['_template_version'])} \| vendored, do not edit it here"
    r" \| SPDX-License-Identifier: 0BSD"
)


class Unchanging(Service):
    """Reads each file only once."""

    @cached_property
    def files(self) -> dict[str, bytes]:
        return super().files


def check_files(service: Service, combination: Combination) -> None:
    names = [*ALWAYS]
    for question, table in (("broker", "_brokers"), ("telemetry", "_telemetries")):
        chosen = QUESTIONS[table][combination[question]]
        names += [f"src/{{package}}/runtime/{name}" for name in chosen["runtime"]]
        names += [f"tests/runtime/{name}" for name in chosen.get("tests", [])]
    names += QUESTIONS["_deploys"][combination["deploy"]]
    names += QUESTIONS["_cis"][combination["ci"]]
    of_telemetry = QUESTIONS["_telemetries"][combination["telemetry"]]
    names += of_telemetry["deploy"]
    if combination["deploy"] == "kubernetes":
        names += of_telemetry["kubernetes"]
        of_broker = QUESTIONS["_brokers"][combination["broker"]]["kubernetes"]
        names += [f"deploy/kubernetes/{name}" for name in of_broker]
    slug = combination.answers["project_slug"]
    expected = {name.format(package=service.package, slug=slug) for name in names}
    for handler in combination.handler_names:
        expected |= {name.format(package=service.package, handler=handler) for name in OF_A_HANDLER}
    assert sorted(service.files) == sorted(expected)
    assert not [path for path in service.path.rglob("*/") if not any(path.iterdir())]


LIBRARIES = {"prometheus": rb"prometheus[_-]client", "opentelemetry": rb"opentelemetry[.-]|OTLP"}


def check_telemetry_that_was_not_chosen(service: Service, combination: Combination) -> None:
    for telemetry, library in LIBRARIES.items():
        found = [name for name, text in service.files.items() if re.search(library, text)]
        assert bool(found) == (combination["telemetry"] in (telemetry, "both")), found


def check_template_language(service: Service, _: Combination) -> None:
    left = re.compile(rb"\{\{ ?cookiecutter|\{%|\n\n\n\n|[ \t]\n")
    assert [name for name, content in service.files.items() if left.search(content)] == []


def check_vendored(service: Service, _: Combination) -> None:
    """The runtime and its tests have the same bytes in every service."""
    folders = {
        f"src/{service.package}/runtime/": TREE / "src/{{cookiecutter.package_name}}/runtime",
        "tests/runtime/": TREE / "tests/runtime",
    }
    for folder, original in folders.items():
        found = {name.removeprefix(folder): content for name, content in service.files.items()}
        for name, content in python_files(original).items():
            assert found.get(name, content) == content, name


@cache
def python_files(folder: Path) -> dict[str, bytes]:
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*.py")}


def check_first_lines(service: Service, _: Combination) -> None:
    """The first line of a vendored file says that it is vendored, and names its licence."""
    vendored = (
        f"src/{service.package}/runtime/",
        "tests/conftest.py",
        "tests/deploy/test_",
        "tests/runtime/",
        "tools/",
    )
    first_lines = {
        name: content.decode().partition("\n")[0]
        for name, content in service.files.items()
        if name.startswith(vendored) and name.endswith(".py")
    }
    assert [name for name, line in first_lines.items() if not OWNER.fullmatch(line)] == []


def check_answers(service: Service, combination: Combination) -> None:
    """The answers are stored for the next update."""
    kept = json.loads(service.read(".template-answers.json"))
    assert kept["version"] == QUESTIONS["_template_version"]
    assert kept["answers"].items() >= combination.answers.items()


def check_bounds(service: Service, _: Combination) -> None:
    """Each dependency has a lower and an upper bound."""
    metadata = service.metadata
    declared = chain(
        metadata["project"]["dependencies"],
        metadata["build-system"]["requires"],
        *metadata["dependency-groups"].values(),
    )
    requirements = [requirement for requirement in declared if isinstance(requirement, str)]
    assert requirements
    assert [
        r for r in requirements if not re.fullmatch(r"[\w-]+(\[\w+\])?>=[\d.]+,<[\d.]+", r)
    ] == []


CHECKS = [
    check_files,
    check_telemetry_that_was_not_chosen,
    check_template_language,
    check_vendored,
    check_first_lines,
    check_answers,
    check_bounds,
]


def for_the_tools(service: Service) -> set[tuple[str, bytes]]:
    """The input of ruff and mypy, file by file; their settings without the names, which change nothing."""
    found = {(name, text) for name, text in service.files.items() if name.endswith(".py")}
    settings = service.read("pyproject.toml").replace(service.package, "PACKAGE")
    return {*found, ("pyproject.toml", settings.replace(service.path.name, "SLUG").encode())}


@pytest.mark.parametrize("telemetry", CHOICES["telemetry"], ids="telemetry={}".format)
@pytest.mark.parametrize("handler_stub", CHOICES["handler_stub"], ids="handler_stub={}".format)
@pytest.mark.parametrize("broker", CHOICES["broker"], ids="broker={}".format)
def test_every_combination_is_complete(
    cookies: Any,
    render: Render,
    hooks_in_this_process: None,
    prove: Prove,
    broker: str,
    handler_stub: str,
    telemetry: str,
) -> None:
    """With these three answers; rendered here and not by `render`, which would keep all renders.

    And each file that ruff and mypy would read is among those that `test_it_is_formatted` and the next two check.
    """
    # The files of a telemetry or a deploy are the same for every broker, except for the names in them.
    costly = [
        *(one for one in SPREAD if one["broker"] == broker),
        *{(one["telemetry"], one.names): one for one in SPREAD}.values(),
        *{(one["deploy"], one.names): one for one in SPREAD}.values(),
    ]
    services = {render(**one.answers) for one in costly}
    seen = set[tuple[str, bytes]]().union(*map(for_the_tools, services))
    fixed = {"broker": broker, "handler_stub": handler_stub, "telemetry": telemetry}
    for combination in every_combination():
        if combination.chosen.items() >= fixed.items():
            result = cookies.bake(extra_context=combination.answers)
            assert result.exit_code == 0, result.exception
            service = Unchanging(result.project_path, combination.answers["package_name"])
            for check in CHECKS:
                check(service, combination)
            unseen = for_the_tools(service) - seen
            assert sorted(name for name, _ in unseen) == []
            shutil.rmtree(service.path)
            prove("combinations rendered", f"broker={broker}")


def test_every_pair_of_answers_is_among_the_costly_combinations() -> None:
    for pair in combinations(CHOICES, 2):
        met = {tuple(one[question] for question in pair) for one in SPREAD}
        assert met == set(product(*(CHOICES[question] for question in pair)))


@pytest.mark.parametrize("broker", CHOICES["broker"])
def test_without_telemetry_no_library_of_it_is_installed(render: Render, broker: str) -> None:
    environment = render(broker=broker, telemetry="none").environment()
    installed = {path.name.lower() for path in environment.glob("lib/*/site-packages/*")}
    assert "structlog" in installed
    assert not [name for name in installed if re.match("opentelemetry|prometheus", name)]


def test_it_is_formatted(service: Service) -> None:
    result = service.run(
        "ruff", "format", "--diff", "--no-cache", environment=service.environment()
    )
    assert result.returncode == 0, result.stdout


def test_it_is_linted(service: Service) -> None:
    result = service.run("ruff", "check", "--no-cache", environment=service.environment())
    assert result.returncode == 0, result.stdout


def test_it_is_typed(service: Service) -> None:
    result = service.run("mypy", environment=service.environment())
    assert result.returncode == 0, result.stdout


def test_mypy_sees_a_library_that_is_missing_after_a_service_that_has_it(
    render: Render, tmp_path: Path
) -> None:
    """Otherwise the test above would pass, since all services of these tests share one cache."""
    for telemetry in ("prometheus", "none"):
        service = render(broker="sqlite", telemetry=telemetry).copy_to(tmp_path / telemetry)
        service.write(f"src/{service.package}/meters.py", "import prometheus_client as meters\n")
        result = service.run("mypy", environment=service.environment())
        assert result.returncode == (telemetry == "none"), result.stdout
    assert "Cannot find implementation or library stub for module" in result.stdout


def test_handlers_are_listed_as_ruff_sorts_them(render: Render) -> None:
    service = render(handlers="order_10, order_9, order, orders, a")
    registry = service.read("src/order_events/handlers/__init__.py")
    assert re.findall(r"^    (\w+),$", registry, re.M) == [
        "a",
        "order",
        "order_9",
        "order_10",
        "orders",
    ]
    result = service.run("ruff", "check", "--no-cache", environment=service.environment())
    assert result.returncode == 0, result.stdout


def test_a_package_named_as_the_example_handler_is_right(render: Render) -> None:
    service = render(package_name="order_created", handlers="order_events, order_created")
    test = service.read("tests/handlers/test_order_events.py")
    assert "from order_created.handlers.order_events import (\n    EXAMPLE,\n    handle,\n" in test
