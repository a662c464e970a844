"""docs/idempotency.md, followed: a crash between the commit and the acknowledgement leaves one effect (effectively once)."""

import json
import os
import re
import shutil

import pytest

from support.documents import section_of
from support.rendered import TEMPLATE, Render, Service

CRASH = TEMPLATE / "tests/support/crash.py"
PAGE = TEMPLATE / "docs/idempotency.md"
SECTIONS = {"postgres": "PostgreSQL", "sqlite": "SQLite"}


def blocks(database: str, language: str) -> list[str]:
    """The code blocks of the section about this database."""
    section = section_of(PAGE, SECTIONS[database])
    return re.findall(rf"^```{language}\n(.*?)^```$", section, re.M | re.S)


@pytest.fixture(params=SECTIONS)
def database(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def service(database: str, render_own: Render) -> Service:
    """A new service with the code of the document; its queue is on the embedded broker."""
    service = render_own(broker=database)
    for block in blocks(database, "python"):
        first_line, _, code = block.partition("\n")
        service.write(first_line.removeprefix("# "), code)
    registry = "src/order_events/handlers/__init__.py"
    if service.has("src/order_events/database.py"):
        text = service.read(registry).replace(
            "\n    yield", "\n    async with database.connected():\n        yield"
        )
        service.write(
            registry, text.replace("from ..runtime", "from .. import database\nfrom ..runtime", 1)
        )
    return service


def crash(service: Service, database: str) -> dict[str, object]:
    (schema,) = blocks(database, "sql")
    shutil.copy(CRASH, service.path)
    command = ("python", CRASH.name, database, schema, "order_events")
    path = os.pathsep.join(["src", "src/order_events", "tests/runtime"])
    result = service.run(*command, environment=service.environment(), PYTHONPATH=path)
    assert result.returncode == 0, result.stdout
    seen: dict[str, object] = json.loads(result.stdout.splitlines()[-1])
    if "missing" in seen:
        if os.environ.get("REQUIRE_BROKERS") == "1":
            pytest.fail(str(seen["missing"]))
        pytest.skip(str(seen["missing"]))
    return seen


def test_a_kill_between_the_commit_and_the_acknowledgement_leaves_one_effect(
    service: Service, database: str
) -> None:
    assert crash(service, database) == {
        "exit codes": [-9, 0],
        "left in the queue": 0,
        "shipments": 1,
        "handled": 1,
    }


def test_without_the_check_there_are_two(service: Service, database: str) -> None:
    name = "src/order_events/handlers/order_created.py"
    handler = service.read(name)
    assert "if first is None:" in handler
    service.write(name, handler.replace("if first is None:", "if False:"))
    assert crash(service, database)["shipments"] == 2


def test_what_the_document_says_passes_the_checks_of_a_service(service: Service) -> None:
    for command in (("ruff", "check", "src"), ("mypy", "src")):
        result = service.run(*command, environment=service.environment())
        assert result.returncode == 0, result.stdout
