"""Every answer is either made safe or refused with one sentence, before anything is written; none is executed."""

import ast
import json
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest

from local_extensions import handler_types, model_name
from support.rendered import (
    CHOICES,
    LONG_NAME,
    PUBLIC_QUESTIONS,
    QUESTIONS,
    TREE,
    Render,
    Result,
    cookiecutter,
    run,
)

PWNED = "open('pwned', 'w')"

REFUSED = [
    *((question, "", "is empty") for question in PUBLIC_QUESTIONS if isinstance(QUESTIONS[question], str)),
    ("project_name", " ", "is empty"),
    ("project_name", "Order\nevents", "one line of printable"),
    ("project_name", "Order\x00events", "one line of printable"),
    ("project_name", "Order\u2028events", "one line of printable"),
    ("project_name", "x" * 101, "longer than 100"),
    ("description", "two\nlines", "one line of printable"),
    ("description", "x" * 101, "longer than 100"),
    ("project_slug", "3d-prints", "start with a letter"),
    ("project_slug", "Order-Events", "lowercase"),
    ("project_slug", "order events", "lowercase"),
    ("project_slug", "-order", "start with a letter"),
    ("project_slug", "größe", "lowercase"),
    ("project_slug", "../evil", "lowercase"),
    ("project_slug", "/tmp/evil", "lowercase"),
    ("project_slug", "a/b", "lowercase"),
    ("project_slug", "a\\b", "lowercase"),
    ("project_slug", ".", "lowercase"),
    ("project_slug", "o'brien", "lowercase"),
    ("project_slug", "x" * 41, "longer than 40"),
    ("project_slug", "aio-pika", "conflicts with"),
    ("project_slug", "on", "conflicts with"),  # YAML reads it as true
    ("project_slug", "pydantic", "conflicts with"),
    ("package_name", "order-events", "lowercase"),
    ("package_name", "OrderEvents", "lowercase"),
    ("package_name", "1st", "start with a letter"),
    ("package_name", "_private", "start with a letter"),
    ("package_name", "..evil", "lowercase"),
    ("package_name", "größe", "lowercase"),
    ("package_name", "x" * 41, "longer than 40"),
    ("package_name", "class", "keyword"),
    ("package_name", "asyncio", "standard library"),
    ("package_name", "json", "standard library"),
    ("package_name", "aio_pika", "conflicts with"),
    ("package_name", "structlog", "conflicts with"),
    ("package_name", "tests", "conflicts with"),
    ("handlers", ", ,", "contains no name"),
    ("handlers", "order_created, order_created", "more than once"),
    ("handlers", "order_created, Order Created", "more than once"),
    ("handlers", "order_created, ORDER_CREATED", "more than once"),
    ("handlers", "2nd_order", "start with a letter"),
    ("handlers", "class", "keyword"),
    ("handlers", "Import", "keyword"),
    ("handlers", "none", "keyword"),
    ("handlers", 'order"created', "must consist of letters"),
    ("handlers", "order\\created", "must consist of letters"),
    ("handlers", "OrderCreated, order.created", "more than once"),
    ("handlers", "com.acme.order.created.v1, order_created_v1, org.acme.order.created.v1", "more than once"),
    ("handlers", "größe", "must consist of letters"),
    ("handlers", "../evil", "must consist of letters"),
    ("handlers", "a'b", "must consist of letters"),
    ("handlers", "order_created\nimport os", "one line of printable"),
    ("handlers", "x" * 41, "too long"),
    ("handlers", "x." * 60 + "y.z", "too long"),
    ("handlers", "message", "is reserved"),
    ("handlers", "lifespan", "is reserved"),
    *((question, name, "on Windows")
      for question in ("project_slug", "package_name", "handlers")
      for name in ("con", "prn", "aux", "nul", "com1", "lpt9")),
    ("handlers", "order_created, Aux", "on Windows"),
    *((question, "{{ 7 * 7 }}", "must not contain") for question in PUBLIC_QUESTIONS[:4]),
    ("handlers", "{{ 7 * 7 }}", "must not contain"),
    ("description", f"{{{{ cycler.__init__.__globals__.__builtins__.{PWNED} }}}}", "must not contain"),
    ("description", "two\n{{ lines }}", "must not contain"),
    ("description", "# {% if 1 %}", "must not contain"),
    ("description", "{% raw %}", "must not contain"),
    ("description", "{# a comment #}", "must not contain"),
]  # fmt: skip

SAFE = [
    ("project_name", 'Order "events"'),
    ("project_name", "O'Brien's orders"),
    ("project_name", "C:\\new\\table\\"),
    ("project_name", "Größe 大 Ελ 🐘"),
    ("project_name", "../../evil"),
    ("project_name", "<script>*[x](y)_`$(touch pwned)`"),
    ("project_name", "x" * 100),
    ("description", '"""'),
    ("description", "'''"),
    ("description", "# not a heading, } } %} %s {0} $HOME"),
    ("description", f'""" + {PWNED} + """'),
    ("description", f"'); {PWNED} #"),
    ("description", f'\\"; {PWNED}; \\'),
    ("description", "ends with a backslash \\"),
]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in which an executed answer would write the file `pwned`."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(("question", "answer", "reason"), REFUSED)
def test_it_is_refused_with_one_sentence(
    cookies: Any, folder: Path, question: str, answer: str, reason: str
) -> None:
    result = cookies.bake(extra_context={question: answer})
    assert isinstance(result.exception, SystemExit)
    sentence = str(result.exception)
    assert reason in sentence
    assert question in sentence or repr(answer)[:60] in sentence
    assert sentence.endswith(".")
    assert sentence.isprintable()
    assert len(sentence) < 200
    made_by_pytest_cookies = {folder / "cookies", folder / "cookies/bake00"}
    assert {*folder.rglob("*")} - made_by_pytest_cookies == set()


@pytest.mark.parametrize(("question", "answer"), SAFE)
def test_it_is_made_safe(render: Render, folder: Path, question: str, answer: str) -> None:
    service = render(**{question: answer}, package_name="order_events", project_slug="order-events")
    assert json.loads(service.read(".template-answers.json"))["answers"][question] == answer
    assert service.metadata["project"]["description"] == (
        answer if question == "description" else QUESTIONS["description"]
    )
    unescaped = re.sub(r"\\([\\`*_\[\]<>|~#&])", r"\1", service.read("README.md"))
    assert answer in unescaped
    for name, content in service.files.items():
        if name.endswith(".py"):
            ast.parse(content, name)
    assert not (folder / "pwned").exists()
    assert not service.has("pwned")


@pytest.mark.parametrize(
    ("answer", "types"),
    [
        ("order_created", {"order_created": "order_created"}),
        ("order_created,payment_received", dict(zip(*[["order_created", "payment_received"]] * 2, strict=True))),
        ("Order  Created,  refund-paid ,", {"order_created": "Order Created", "refund_paid": "refund-paid"}),
        ("OrderCreated, HTTPRequest2Sent", {"order_created": "OrderCreated", "httprequest2_sent": "HTTPRequest2Sent"}),
        ("__order__created__", {"order_created": "__order__created__"}),
        ("order.created", {"order_created": "order.created"}),
        ("com.acme.order.created.v1", {"order_created": "com.acme.order.created.v1"}),
        ("com.acme.OrderCreated", {"order_created": "com.acme.OrderCreated"}),
        ("urn:acme:orders/created", {"orders_created": "urn:acme:orders/created"}),
        ("order.created.v1, order.created.v2", {"order_created": "order.created.v1", "order_created_v2": "order.created.v2"}),
        ("a.b, c_d", {"a_b": "a.b", "c_d": "c_d"}),
        ("TestCompleted, conftest", {"on_test_completed": "TestCompleted", "on_conftest": "conftest"}),
        (LONG_NAME, {LONG_NAME: LONG_NAME}),
    ],
)  # fmt: skip
def test_a_type_stays_as_it_was_typed_and_its_files_have_a_python_name(
    answer: str, types: dict[str, str]
) -> None:
    assert handler_types(answer) == types


@pytest.mark.parametrize(
    ("name", "model"),
    [("order_created", "OrderCreated"), ("a", "A"), ("a_b", "ABEvent"), ("a1", "A1Event")],
)
def test_a_model_is_not_named_as_a_constant(name: str, model: str) -> None:
    assert model_name(name) == model


def names_in(stub: Path) -> set[str]:
    """The names that a stub imports, defines or looks up."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(stub.read_text("utf-8"))):
        if isinstance(node, ast.alias | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.Name):
            names.add(node.id)
    return names - {"order_created", "OrderCreated"}


def test_a_handler_cannot_take_a_name_that_its_files_use() -> None:
    in_the_registry = names_in(TREE / "stubs/registry.py")
    in_its_files = set[str]().union(*map(names_in, (TREE / "stubs").glob("*/*.py")))
    taken = QUESTIONS["_taken_handlers"]
    # The registry imports the handler by its name; the handler's own files have only the name of its model.
    unusable = {name for name in in_the_registry if re.fullmatch("[a-z][a-z_]*", name)}
    assert unusable <= set(taken)
    models = {name for name in in_its_files if re.fullmatch("([A-Z][a-z]+)+", name)}
    assert models <= set(map(model_name, taken))
    assert {"around", "effects", "lifespan"} <= set(taken), (
        "the entry point looks for these in the registry"
    )


@pytest.mark.parametrize(
    ("question", "answer"),
    [(q, answer) for q in ("broker", "telemetry") for answer in QUESTIONS[q]],
)
def test_a_package_cannot_take_a_name_that_is_installed_beside_it(
    render: Render, question: str, answer: str
) -> None:
    environment = render(**{question: answer}).environment()
    [site_packages] = environment.glob("lib/*/site-packages")
    installed = {path.stem for path in site_packages.iterdir() if path.suffix in ("", ".py", ".so")}
    modules = {name for name in installed if re.fullmatch("[a-z][a-z0-9_]*", name)}
    assert {"structlog", "pytest"} <= modules
    assert sorted(modules - set(QUESTIONS["_taken_names"])) == []


def test_a_package_cannot_take_a_name_that_its_tests_import(render: Render) -> None:
    """Pytest's pythonpath has the folder of the package and that of the vendored tests."""
    service = render()
    options = service.metadata["tool"]["pytest"]["ini_options"]
    found = [path for folder in options["pythonpath"] for path in (service.path / folder).iterdir()]
    modules = {path.stem for path in found if re.fullmatch(r"[a-z]+(\.py)?", path.name)}
    assert {"runtime", "harness"} <= modules
    assert sorted(modules - set(QUESTIONS["_taken_names"])) == []


def test_every_question_is_asked_in_words() -> None:
    prompts = QUESTIONS["__prompts__"]
    assert list(prompts) == PUBLIC_QUESTIONS
    for question in CHOICES:
        _title, *texts = prompts[question].values()
        assert list(prompts[question]) == ["__prompt__", *QUESTIONS[question]]
        assert [text.endswith("(recommended)") for text in texts] == [True] + [False] * (
            len(texts) - 1
        )
        columns = {re.fullmatch(r"(\S+ +)\S.*", text)[1] for text in texts}  # type: ignore[index]  # no match is a failure
        assert len({len(column) for column in columns}) == 1


def test_questions_can_be_answered_one_by_one(tmp_path: Path) -> None:
    answers = ['Mein "Shop"', "", "", "Verkauft.", "8", "order created, refund", "3", "2", "3", "2"]
    result = cookiecutter(tmp_path, stdin="\n".join(answers))
    assert result.returncode == 0, result.stdout
    assert result.returncode == 0, result.stdout
    kept = json.loads((tmp_path / "mein-shop/.template-answers.json").read_text("utf-8"))
    assert kept["answers"] == {
        "project_name": 'Mein "Shop"',
        "project_slug": "mein-shop",
        "package_name": "mein_shop",
        "description": "Verkauft.",
        "broker": "sqlite",
        "handlers": "order created, refund",
        "handler_stub": "batch",
        "telemetry": "opentelemetry",
        "deploy": "systemd",
        "ci": "gitlab",
    }


@pytest.mark.parametrize(
    ("typed", "sentence", "repeated"),
    [
        ("{{ 7 * 7 }}\n", "project_name '{{ 7 * 7 }}' must not contain", []),
        ("Shop\nShop_Events\n", "project_slug 'Shop_Events' must consist of", ["project_name=Shop"]),
        ("My shop\n\nclass\n", "package_name 'class' is a Python keyword", ["'project_name=My shop'", "project_slug=my-shop"]),
        ("Shop\n\n\nSells.\n8\nclass, true, a, a\n", "handlers: 'class' would need the name class, which is a Python",
         ["project_name=Shop", "project_slug=shop", "package_name=shop", "description=Sells.", "broker=sqlite"]),
    ],
)  # fmt: skip
def test_an_answer_is_refused_right_after_it_was_typed_and_the_others_are_repeated(
    tmp_path: Path, typed: str, sentence: str, repeated: list[str]
) -> None:
    result = cookiecutter(tmp_path, "-o", "out", "deploy=none", "project_name=x", stdin=typed)
    assert result.returncode == 1
    assert sentence in result.stdout
    command = result.stdout.rstrip().splitlines()[-1].strip()
    assert command.startswith(f"cookiecutter {TREE.parent} --default-config -o out deploy=none")
    assert [word for word in repeated if f" {word}" not in command] == []
    assert "project_name=x" not in command
    assert [path.name for path in tmp_path.iterdir()] == ["home"]


def test_the_command_that_repeats_the_other_answers_does(tmp_path: Path) -> None:
    typed = "Mein Shop\n\n\nVerkauft.\n8\nclass\n"
    refused = cookiecutter(tmp_path, "deploy=none", stdin=typed)
    _, *arguments = shlex.split(refused.stdout.rstrip().splitlines()[-1])
    result = run(
        sys.executable, "-m", "cookiecutter", *arguments, "handlers=classes", "--no-input",
        cwd=tmp_path, env={"HOME": str(tmp_path / "home")},
    )  # fmt: skip
    assert result.returncode == 0, result.stdout
    kept = json.loads((tmp_path / "mein-shop/.template-answers.json").read_text("utf-8"))["answers"]
    assert (kept["description"], kept["broker"]) == ("Verkauft.", "sqlite")
    assert (kept["deploy"], kept["handlers"]) == ("none", "classes")


def test_all_faults_are_named(tmp_path: Path) -> None:
    answers = ("project_slug=A", "package_name=json", "description=", "handlers=class,a,1")
    result = cookiecutter(tmp_path, "--no-input", *answers)
    assert result.returncode == 1
    assert [line.split("'")[0].strip() for line in result.stdout.splitlines()] == [
        "project_slug", "package_name", "description is empty.", "handlers:", "handlers:",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("answer", "sentence"),
    [
        pytest.param(
            "handlers=class",
            "handlers: 'class' would need the name class, which is a Python",
            id="keyword",
        ),
        pytest.param("project_slug=../x", "project_slug '../x' must consist of", id="path"),
        pytest.param(
            "description={{ 7*7 }}", "the answer '{{ 7*7 }}' must not contain", id="Jinja"
        ),
    ],
)
def test_the_command_prints_nothing_but_that_sentence(
    tmp_path: Path, answer: str, sentence: str
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    result = cookiecutter(tmp_path, "--no-input", "-o", "out", answer)
    assert result.returncode == 1
    assert result.stdout.startswith(sentence)
    assert result.stdout.count("\n") == 1
    assert {path.name for path in tmp_path.iterdir()} == {"home", "out"}
    assert list(out.iterdir()) == []


def test_an_unknown_broker_is_refused_by_cookiecutter_itself(tmp_path: Path) -> None:
    result = cookiecutter(tmp_path, "--no-input", "broker=pulsar")
    assert result.returncode == 1
    assert "pulsar provided for choice variable broker, but the choices are" in result.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["home"]


def replayed(tmp_path: Path, changes: dict[str, Any]) -> Result:
    assert cookiecutter(tmp_path, "--no-input").returncode == 0
    [replay] = (tmp_path / "home").rglob("*.json")
    answers = json.loads(replay.read_text("utf-8"))["cookiecutter"]
    replay.write_text(json.dumps({"cookiecutter": {**answers, "project_slug": "other", **changes}}))
    result = cookiecutter(tmp_path, "--replay-file", str(replay))
    assert result.returncode == 1
    assert not (tmp_path / "other").exists()
    return result


def test_replayed_answers_are_checked_too(tmp_path: Path) -> None:
    result = replayed(tmp_path, {"handlers": "class"})
    assert (
        "handlers: 'class' would need the name class, which is a Python keyword." in result.stdout
    )


@pytest.mark.parametrize(
    "changes",
    [{"_template_version": "0.0.9"}, {"_brokers": {**QUESTIONS["_brokers"], "nats": {}}}],
    ids=str,
)
def test_answers_of_another_version_are_not_replayed(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    version = changes.get("_template_version", QUESTIONS["_template_version"])
    result = replayed(tmp_path, changes)
    assert f"these answers are of another version of the template ({version}" in result.stdout


def test_a_version_of_the_users_own_defaults_is_refused(tmp_path: Path) -> None:
    (tmp_path / "rc").write_text("default_context:\n  _template_version: '9.9'\n")
    command = (
        sys.executable,
        "-m",
        "cookiecutter",
        str(TREE.parent),
        "--no-input",
        "--config-file",
        "rc",
    )
    result = run(*command, cwd=tmp_path, check=False, env={"HOME": str(tmp_path)})
    assert "these answers are of another version of the template (9.9" in result.stdout
    assert result.stdout.count("\n") == 1
