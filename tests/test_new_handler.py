"""A handler is added by one command, in the style of the service's stubs."""

import shutil
from pathlib import Path

import pytest

from support.rendered import LONG_NAME, QUESTIONS, Prove, Render, Result, Service

REGISTRY = "src/order_events/handlers/__init__.py"
TOOL, COMMAND = ("tools/new_handler.py",), ("-m", "order_events", "new-handler")


def add(service: Service, *names: str, by: tuple[str, ...] = TOOL) -> Result:
    return service.run("python", *by, *names, environment=service.environment())


def check_well(service: Service) -> None:
    for command in (
        ["ruff", "check", "--no-cache"],
        ["ruff", "format", "--check", "--no-cache"],
        ["mypy", "src", "tests/handlers"],
        [
            "python",
            "-X",
            "dev",
            "-m",
            "pytest",
            "-q",
            "tests/handlers",
            "tests/runtime/test_drift.py",
        ],
    ):
        result = service.run(*command, environment=service.environment())
        assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("handler_stub", QUESTIONS["handler_stub"])
def test_a_new_handler_is_as_one_that_was_scaffolded(
    render: Render, render_own: Render, prove: Prove, handler_stub: str
) -> None:
    answers = {"broker": "sqlite", "handler_stub": handler_stub}
    service = render_own(**answers, handlers="order_10, order_9")
    for name, by in (("order_2", TOOL), ("refund_issued", COMMAND), ("a", TOOL)):
        result = add(service, name, by=by)
        assert result.returncode == 0, result.stdout
    wanted = render(**answers, handlers="order_10, order_9, order_2, refund_issued, a").files
    found = service.files
    differ = {name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name)}
    assert differ <= {".template-answers.json", "README.md"}
    check_well(service)
    prove("handlers added afterwards", f"handler_stub={handler_stub}")


def test_a_new_handler_with_the_longest_name_passes_its_checks(render_own: Render) -> None:
    service = render_own(broker="sqlite")
    assert add(service, LONG_NAME).returncode == 0
    check_well(service)


def test_a_handler_may_be_named_as_a_module_that_it_imports(render_own: Render) -> None:
    service = render_own(broker="sqlite", handlers="json, asyncio, structlog, pydantic")
    check_well(service)
    service.demo()


@pytest.mark.parametrize(
    ("message_type", "name"),
    [
        ("OrderPaid", "order_paid"),
        ("order.paid", "order_paid"),
        ("com.acme.order.paid.v1", "order_paid"),
        ("order.created.v2", "order_created_v2"),
        ("TestCompleted", "on_test_completed"),
        ("test", "on_test"),
        ("conftest", "on_conftest"),
    ],
)
def test_a_type_is_the_key_as_producers_write_it(
    render_own: Render, message_type: str, name: str
) -> None:
    service = render_own(broker="sqlite")
    result = add(service, message_type)
    assert result.returncode == 0, result.stdout
    registry = service.read(REGISTRY)
    assert f'    "{message_type}": {name}.handle,\n' in registry
    assert f'    "{message_type}": {name}.EXAMPLE,\n' in registry
    assert service.has(f"tests/handlers/test_{name}.py")
    assert f"``{message_type}``" in service.read(f"src/order_events/handlers/{name}.py")
    check_well(service)
    service.demo()


def test_after_a_second_handler_the_first_one_gets_messages_of_all_other_types(
    render_own: Render,
) -> None:
    """Messages without a type were handled before, and still are: a new file makes none of them a dead letter."""
    service = render_own(broker="sqlite")
    result = add(service, "refund_issued")
    assert "the handler of 'order_created' got every message" in result.stdout
    assert '    "*": order_created.handle,\n' in service.read(REGISTRY)
    check_well(service)
    again = add(service, "RefundPaid")
    assert "got every message" not in again.stdout
    assert service.read(REGISTRY).count('\n    "*": ') == 1
    check_well(service)


@pytest.mark.parametrize("handler_stub", QUESTIONS["handler_stub"])
def test_types_of_every_spelling_pass_the_checks(render: Render, handler_stub: str) -> None:
    types = (
        "OrderCreated, com.acme.order.paid.v1, test_completed, refund issued, "
        + "com." * 22
        + "a.b"
    )
    service = render(broker="sqlite", handler_stub=handler_stub, handlers=types)
    check_well(service)
    service.demo()
    assert '"com.acme.order.paid.v1": order_paid.handle' in service.read(REGISTRY)


@pytest.mark.parametrize(
    ("names", "sentence"),
    [
        (["2nd"], "start with a letter"),
        (["größe"], "must consist of letters"),
        (["class"], "which is a Python keyword"),
        (["true"], "which is a Python keyword"),
        (["message"], "is reserved"),
        (["com1"], "on Windows"),
        (["../x"], "must consist of letters"),
        (['x"; import os'], "must consist of letters"),
        (["x\n"], "must consist of letters"),
        (["*"], "must consist of letters"),
        (["order_created"], "order_created.py already exists"),
        (["OrderCreated"], "order_created.py already exists"),
        (["a" * 41], "too long"),
        ([], "expected one message type"),
        (["a", "b"], "expected one message type"),
    ],
    ids=repr,
)
def test_a_type_that_cannot_be_one_is_refused_with_one_sentence(
    render_own: Render, names: list[str], sentence: str
) -> None:
    service = render_own(broker="sqlite")
    before = service.files
    result = add(service, *names)
    assert result.returncode == 2
    assert result.stdout.startswith("new_handler.py: ")
    assert sentence in result.stdout
    assert result.stdout.count("\n") == 1
    assert service.files == before


def test_an_entry_over_several_lines_stays_as_it_is(render_own: Render) -> None:
    service = render_own(broker="sqlite", handlers="order_created, order_paid")
    entry = '    "order_created": (\n        order_created.handle  # ours\n    ),\n'
    line = '    "order_created": order_created.handle,\n'
    service.write(REGISTRY, service.read(REGISTRY).replace(line, entry))
    assert add(service, "a").returncode == 0
    assert entry in service.read(REGISTRY)


def test_one_handler_of_several_lines_is_not_silently_one_of_two(render_own: Render) -> None:
    service = render_own(broker="sqlite")
    entry = '    "order_created": (\n        order_created.handle  # ours\n    ),\n'
    line = '    "order_created": order_created.handle,\n'
    service.write(REGISTRY, service.read(REGISTRY).replace(line, entry))
    before = service.files
    result = add(service, "a")
    assert (result.returncode, result.stdout.count("\n")) == (2, 1)
    assert "add the handler by hand" in result.stdout
    assert service.files == before


def test_a_registry_that_was_rewritten_is_left_alone(render_own: Render) -> None:
    service = render_own(broker="sqlite")
    service.write("src/order_events/handlers/__init__.py", "HANDLERS = {}\n")
    before = service.files
    result = add(service, "refund_issued")
    assert result.returncode == 2
    assert "src/order_events/handlers/__init__.py contains no block" in result.stdout
    assert service.files == before


def test_the_command_says_what_is_wrong_with_a_name_as_the_tool_does(render_own: Render) -> None:
    service = render_own(broker="sqlite")
    by_tool, by_command = add(service, "class"), add(service, "class", by=COMMAND)
    assert (by_command.returncode, by_command.stdout) == (2, by_tool.stdout)


@pytest.mark.parametrize("command", [("new-handler", "refund_issued"), ("check", "--vendored")])
def test_outside_of_a_checkout_its_commands_fail_with_one_sentence(
    render_own: Render, tmp_path: Path, command: tuple[str, ...]
) -> None:
    """In an image or after a plain `pip install`, only the package exists."""
    service = render_own(broker="sqlite")
    elsewhere = tmp_path / "a/b/c"
    shutil.copytree(service.path / "src", elsewhere)
    program = ["python", "-m", "order_events", *command]
    result = service.run(*program, environment=service.environment(), PYTHONPATH=str(elsewhere))
    assert result.returncode == 2
    assert "in a checkout of the service" in result.stdout
    assert result.stdout.count("\n") == 1


def test_a_handler_whose_file_was_deleted_is_one_sentence(render_own: Render) -> None:
    service = render_own(broker="sqlite", handlers="order_billed, order_created")
    deleted = service.path / "src/order_events/handlers/order_billed.py"
    text = deleted.read_text()
    command = ("python", "-m", "order_events", "check")
    deleted.unlink()
    result = service.run(*command, environment=service.environment())
    sentence = "handlers/order_billed.py is imported, but does not exist"
    assert (result.returncode, result.stdout) == (2, f"{sentence}\n")
    deleted.write_text(f"import no_such_package\n{text}")
    result = service.run(*command, environment=service.environment())
    assert (result.returncode, result.stdout.count("Traceback")) == (1, 1)
