"""Every combination of answers gives a complete service that is formatted, linted, typed and its own."""

import json
import re
from itertools import chain
from pathlib import Path

import pytest

from conftest import Prove, Render
from rendered import QUESTIONS, TREE, Combination, Service

# Everything that a service has, whatever was answered; {package} stands for its package.
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
    "src/{package}/runtime/brokers/source.py",
    "src/{package}/runtime/brokers/sqlite.py",
    "src/{package}/runtime/cancellation.py",
    "src/{package}/runtime/cli.py",
    "src/{package}/runtime/consumer.py",
    "src/{package}/runtime/demo.py",
    "src/{package}/runtime/handlers.py",
    "src/{package}/runtime/logs.py",
    "src/{package}/runtime/message.py",
    "src/{package}/runtime/settings.py",
    "src/{package}/runtime/watchdog.py",
    "src/{package}/settings.py",
    "tests/__init__.py",
    "tests/handlers/__init__.py",
    "tests/runtime/__init__.py",
    "tests/runtime/conftest.py",
    "tests/runtime/handoff.py",
    "tests/runtime/process.py",
    "tests/runtime/servers/__init__.py",
    "tests/runtime/servers/local.py",
    "tests/runtime/servers/proxy.py",
    "tests/runtime/servers/sqlite.py",
    "tests/runtime/service.py",
    "tests/runtime/test_cancellation.py",
    "tests/runtime/test_cancellation_properties.py",
    "tests/runtime/test_cli.py",
    "tests/runtime/test_consumer.py",
    "tests/runtime/test_contract.py",
    "tests/runtime/test_drift.py",
    "tests/runtime/test_handlers.py",
    "tests/runtime/test_outage.py",
    "tests/runtime/test_settings.py",
    "tests/runtime/test_shutdown.py",
    "tests/runtime/test_signals.py",
    "tests/runtime/test_source.py",
    "tests/runtime/test_sqlite.py",
]
OF_A_HANDLER = ["src/{package}/handlers/{handler}.py", "tests/handlers/test_{handler}.py"]

OWNER = re.compile(
    rf"# cookiecutter-consumer {re.escape(QUESTIONS['_template_version'])} \| the template's file: .+"
)


def test_it_has_exactly_the_files_of_its_answers(
    service: Service, combination: Combination, prove: Prove
) -> None:
    broker = QUESTIONS["_brokers"][combination.broker]
    names = [*ALWAYS, *(f"src/{{package}}/runtime/{name}" for name in broker["runtime"])]
    names += [f"tests/runtime/{name}" for name in broker["tests"]]
    names += QUESTIONS["_ci"][combination.ci]
    expected = {name.format(package=service.package) for name in names}
    for handler in combination.handler_names:
        expected |= {name.format(package=service.package, handler=handler) for name in OF_A_HANDLER}
    assert sorted(service.files) == sorted(expected)
    prove("combinations rendered", f"broker={combination.broker}")


def test_no_template_language_is_left(service: Service) -> None:
    left = re.compile(rb"\{\{ ?cookiecutter|\{%|\n\n\n\n|[ \t]\n")
    assert [name for name, content in service.files.items() if left.search(content)] == []


def test_the_runtime_is_the_same_bytes_in_every_service(service: Service) -> None:
    folder = f"src/{service.package}/runtime/"
    found = {name.removeprefix(folder): content for name, content in service.files.items()}
    original = TREE / "src/{{cookiecutter.package_name}}/runtime"
    for file in original.rglob("*.py"):
        name = file.relative_to(original).as_posix()
        assert found.get(name, file.read_bytes()) == file.read_bytes(), name


def test_the_first_line_of_a_vendored_file_says_whose_it_is(service: Service) -> None:
    vendored = (f"src/{service.package}/runtime/", "tests/runtime/")
    first_lines = {
        name: content.decode().partition("\n")[0]
        for name, content in service.files.items()
        if name.startswith(vendored) and name.endswith(".py")
    }
    assert [name for name, line in first_lines.items() if not OWNER.fullmatch(line)] == []


def test_its_answers_are_kept_for_the_next_update(
    service: Service, combination: Combination
) -> None:
    kept = json.loads(service.read(".template-answers.json"))
    assert kept["version"] == QUESTIONS["_template_version"]
    assert kept["answers"].items() >= combination.answers.items()


def test_it_declares_bounds_on_both_sides_of_each_dependency(service: Service) -> None:
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


def test_it_is_formatted(service: Service) -> None:
    result = service.run(
        "ruff", "format", "--diff", "--no-cache", environment=service.environment()
    )
    assert result.returncode == 0, result.stdout


def test_it_is_linted(service: Service) -> None:
    result = service.run("ruff", "check", "--no-cache", environment=service.environment())
    assert result.returncode == 0, result.stdout


@pytest.fixture(scope="session")
def mypy_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("mypy")


def test_it_is_typed(service: Service, mypy_cache: Path) -> None:
    result = service.run("mypy", f"--cache-dir={mypy_cache}", environment=service.environment())
    assert result.returncode == 0, result.stdout


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
    assert (
        "from order_created.handlers.order_events import (\n    EXAMPLE,\n    OrderEvents,\n"
        in test
    )
