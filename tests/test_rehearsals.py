"""Right handlers have no finding at any seed: the stubs, those of the documentation and of tests/runtime/rehearsed.py.

``REHEARSAL_SEEDS=200 python3 tasks.py test tests/test_rehearsals.py`` takes that many seeds, SEEDS_OF_A_TEST at a time.
"""

import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path

import pytest

from harness.servers import ServerMissing, skip_without_server
from support.answering import answering
from support.crash import postgres_database, sqlite_database
from support.documents import section_of, steps
from support.rendered import BIN, CHOICES, MODULES, TEMPLATE, TREE, Render, Result, Service, run

SEEDS = int(os.environ.get("REHEARSAL_SEEDS", "1"))
SEEDS_OF_A_TEST = 5
RANGES = [
    " ".join(map(str, range(first, min(first + SEEDS_OF_A_TEST, SEEDS))))
    for first in range(0, SEEDS, SEEDS_OF_A_TEST)
]
PROGRAM = TEMPLATE / "tests/support/seeded.py"

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]  # each trial has its own time limit


STORED = """
import os, sqlite3
from contextlib import closing
def effects():
    with closing(sqlite3.connect(os.environ["DATABASE"])) as database:
        return database.execute("SELECT reference FROM shipments").fetchall()
"""
CONNECTED = """
import os, asyncpg
from .. import database
@asynccontextmanager
async def lifespan():
    async with database.connected():
        yield
async def effects():
    connection = await asyncpg.connect(os.environ["DATABASE_URL"])
    try:
        return [*map(tuple, await connection.fetch("SELECT reference FROM shipments"))]
    finally:
        await connection.close()
"""
FILES = """
import os
from pathlib import Path
def effects():
    return [(one.name, one.read_text()) for one in Path(os.environ["INVOICES_FOLDER"]).glob("*")]
"""
MORE = {
    "tutorial": """
from . import invoice_requested
HANDLERS = {**HANDLERS, "invoice_requested": invoice_requested.handle}
EXAMPLES = {**EXAMPLES, "invoice_requested": invoice_requested.EXAMPLE}
""",
    "publishing": """
from . import order_counted
HANDLERS = {**HANDLERS, "order_counted": order_counted.handle}
EXAMPLES = {**EXAMPLES, "order_counted": b'{"reference": "A-1001", "pieces": 2}'}
""",
    "handlers": """
EXAMPLES = {"order_created": b'{"product": "apple", "pieces": 2}'}
def effects():
    with closing(sqlite3.connect("orders.db")) as database:  # before `lifespan` makes the table, too
        made = database.execute("SELECT 1 FROM sqlite_master WHERE name = 'orders'").fetchall()
        return made and database.execute("SELECT product, cents FROM orders").fetchall()
""",
    "existing": """
EXAMPLES = dict.fromkeys(["order.created", "order.paid", "x"], b'{"reference": "A-1001"}')
""",
    "formats": r"""
EXAMPLES = {"order_created": b"\0\0\0\0\7" + b"\x12from-avro\2"}
""",
    "sentry": """
EXAMPLES = {"order_created": order_created.EXAMPLE}
""",
    "testing": """
@asynccontextmanager
async def lifespan():
    yield order_created.Stock({f"A-{number}": 9 for number in range(9999)})
""",
    "idempotency#SQLite": STORED,
    "idempotency#PostgreSQL": CONNECTED,
    "adopt": FILES,
}
"""Each page with complete handlers, or its section; and additions to handlers/__init__.py that the
page needs: handlers that it does not register, examples, values of `lifespan`, `effects`."""
FRAGMENTS = {
    "docs/first-incident.md": "its dependency is away: tests/test_first_incident.py runs it",
    "docs/retries.md": "what it calls, as `stock`, is left to the reader",
    "docs/tracing.md": "what it calls, `stock`, is left to the reader",
    "README.md": "a part of the stub, which is rehearsed",
    f"{TREE.name}/README.md": "parts of the stubs, which are rehearsed",
}
"""The other places with handlers, and the reasons why these cannot run."""
SCHEMA = """{"type": "record", "name": "Order", "fields": [
    {"name": "reference", "type": "string"}, {"name": "cents", "type": "long"}]}"""
DATABASES = {"idempotency#SQLite": sqlite_database, "idempotency#PostgreSQL": postgres_database}


def page_of(name: str) -> tuple[Path, str]:
    page, _, heading = name.partition("#")
    return TEMPLATE / f"docs/{page}.md", heading


def write(service: Service, name: str) -> None:
    """Write the files of the page, and run its commands that install and generate."""
    for file, text in steps(*page_of(name)):
        if file:
            service.write(file, text.replace("asyncio.sleep(3)", "asyncio.sleep(0.03)"))
        elif re.match("uv add|uv run python", text):
            run("sh", "-c", text, cwd=service.path)
    if name == "adopt":
        shutil.copy(
            TEMPLATE / "examples/before/src/invoices/billing.py", service.path / "src/invoices"
        )
    registry = f"src/{service.package}/handlers/__init__.py"
    service.write(registry, service.read(registry) + MORE[name])


@pytest.fixture(scope="session")
def written(render: Render, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Service]:
    @cache
    def service_of(name: str) -> Service:
        answers = {"broker": "sqlite", "deploy": "none"}
        if name == "adopt":
            answers |= {"project_name": "Invoices", "handlers": "order_billed"}
        if name.startswith("stub-"):
            answers["handler_stub"] = name.removeprefix("stub-")
        service = render(**answers).copy_to(tmp_path_factory.mktemp("page"))
        if name in MORE:
            write(service, name)
        return service

    return service_of


@contextmanager
def surroundings(name: str, folder: Path) -> Iterator[dict[str, str]]:
    """The variables for the dependencies of the page's handlers."""
    answer = json.dumps({"schema": SCHEMA}).encode()
    with ExitStack() as running:
        if (database := DATABASES.get(name)) is not None:
            try:
                variables, query = running.enter_context(database(folder))
            except ServerMissing as missing:
                skip_without_server(missing)
            [schema] = re.findall(r"^```sql\n(.*?)^```", section_of(*page_of(name)), re.M | re.S)
            query(schema)
            yield variables
        elif name == "formats":
            address = running.enter_context(answering(lambda _path, _body: (200, answer)))
            yield {"ORDER_EVENTS_SCHEMA_REGISTRY": f"http://{address}"}
        else:
            yield {"INVOICES_FOLDER": str(folder / "invoices")}


def assert_no_finding(printed: Result, seeds: str) -> list[str]:
    """Returns the names of the handlers."""
    assert printed.returncode == 0, printed.stdout
    starts = [found.start() for found in re.finditer(r"^\{$", printed.stdout, re.M)]
    reports = [json.JSONDecoder().raw_decode(printed.stdout, start)[0] for start in starts]
    assert [str(one["seed"]) for one in reports] == seeds.split()
    for report in reports:
        assert report["findings"] == []
        assert all(one["trials"] for one in report["handlers"].values()), report["handlers"]
    return list(reports[0]["handlers"])


@pytest.mark.parametrize("name", [*MORE, *(f"stub-{one}" for one in CHOICES["handler_stub"])])
@pytest.mark.parametrize("seeds", RANGES)
def test_handlers_of_the_documentation_give_no_finding(
    name: str, seeds: str, written: Callable[[str], Service], tmp_path: Path
) -> None:
    service = written(name)
    own = service.path / ".venv" / BIN / "python"  # of a page that installs packages
    python = own if own.exists() else sys.executable
    with surroundings(name, tmp_path) as variables:
        env = {"PYTHONPATH": "src", "TMPDIR": str(tmp_path), "SEEDS": seeds, **variables}
        printed = run(
            str(python), str(PROGRAM), service.package, cwd=service.path, check=False, env=env
        )
    handlers = assert_no_finding(printed, seeds)
    files = {*(service.path / f"src/{service.package}/handlers").glob("*.py")}
    assert len(handlers) >= len(files) - 1, handlers


@pytest.mark.parametrize("seeds", RANGES)
def test_handlers_that_are_right_give_no_finding(seeds: str, tmp_path: Path) -> None:
    runtime = os.pathsep.join([MODULES["PYTHONPATH"], str(TEMPLATE / "tests/runtime")])
    env = {
        "PYTHONPATH": runtime,
        "TMPDIR": str(tmp_path),
        "SEEDS": seeds,
        "CONSUMER_DRAIN_SECONDS": "1",
    }
    printed = run(
        sys.executable, str(PROGRAM), "rehearsed", "RIGHT", cwd=tmp_path, check=False, env=env
    )
    assert len(assert_no_finding(printed, seeds)) == 14


def test_each_handler_of_the_documentation_is_rehearsed_or_says_why_not() -> None:
    pages = [TEMPLATE / "README.md", TREE / "README.md", *(TEMPLATE / "docs").rglob("*.md")]
    with_handlers = {
        page.relative_to(TEMPLATE).as_posix()
        for page in pages
        if re.search(r"^(async )?def handle\(", page.read_text(encoding="utf-8"), re.M)
    }
    rehearsed = {page_of(name)[0].relative_to(TEMPLATE).as_posix() for name in MORE}
    assert with_handlers == rehearsed | FRAGMENTS.keys()
    for name in MORE:
        for file, text in steps(*page_of(name)):
            assert "def handle(" not in text or re.match(r"src/\w+/handlers/", file), name
