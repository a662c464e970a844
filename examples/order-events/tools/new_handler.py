# cookiecutter-consumer 0.1.0 | the template's file: updated by the template, so do not edit it here.
"""Adds a handler for another kind of message: ``python3 tools/new_handler.py refund_issued``.

Writes its file and its test from the two stubs beside this file, which are yours to change, and enters it in the
registry. Nothing that exists is overwritten. Exit codes: 0; 2 for a name that cannot be one, with nothing written.
"""

import keyword
import re
import sys
from pathlib import Path

TOOLS = Path(__file__).resolve().parent
PROJECT = TOOLS.parent
PACKAGE = "order_events"
HANDLERS = PROJECT / "src" / PACKAGE / "handlers"
TAKEN = "asynccontextmanager aware_datetime base_model bytes field lifespan message reject retry str unicode_decode_error validation_error"
"""Names that the handlers' files use themselves."""
LONGEST_NAME = 40
BLOCKS = ("from . import ", "HANDLERS: ", "EXAMPLES: ")
"""How the lines begin in the registry, under each of which the handler gets a line."""


def main(arguments: list[str]) -> int:
    if len(arguments) != 1:
        sys.exit(refuse("give the name of one kind of message, for example refund_issued."))
    [name] = arguments
    class_name = "".join(word.capitalize() for word in name.split("_"))
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or len(name) > LONGEST_NAME:
        return refuse(
            f"{name!r} must be lower-case letters, digits and underscores, a letter first,"
            f" {LONGEST_NAME} characters at most."
        )
    if keyword.iskeyword(name) or keyword.iskeyword(class_name) or f" {name} " in f" {TAKEN} ":
        return refuse(f"{name!r} is a name that the handlers' files use themselves.")
    files = {
        HANDLERS / f"{name}.py": TOOLS / "handler.stub",
        PROJECT / f"tests/handlers/test_{name}.py": TOOLS / "test_handler.stub",
    }
    if there := [path for path in files if path.exists()]:
        return refuse(f"{name!r} is there already: {there[0].relative_to(PROJECT).as_posix()}.")
    registry = HANDLERS / "__init__.py"
    entered = registry.read_text(encoding="utf-8")
    lines = (
        f"    {name},\n",
        f'    "{name}": {name}.handle,\n',
        f'    "{name}": {name}.EXAMPLE,\n',
    )
    for beginning, line in zip(BLOCKS, lines, strict=True):
        pattern = "^" + re.escape(beginning) + r".*[({]\n((?:    .*\n)*)[)}]"
        block = re.search(pattern, entered, re.M)
        if block is None:
            where = registry.relative_to(PROJECT).as_posix()
            return refuse(f"{where} has no lines {beginning!r} ... to enter it under.")
        inside = sorted([*block[1].splitlines(keepends=True), line], key=natural_order)
        entered = entered[: block.start(1)] + "".join(inside) + entered[block.end(1) :]
    words = {"order_events": PACKAGE, "order_created": name, "OrderCreated": class_name}
    word = re.compile(rf"\b({'|'.join(words)})\b")
    for path, stub in files.items():
        text = word.sub(lambda found: words[found[0]], stub.read_text(encoding="utf-8"))
        path.write_text(text, encoding="utf-8", newline="\n")
    registry.write_text(entered, encoding="utf-8", newline="\n")
    for path in (*files, registry):
        print(path.relative_to(PROJECT).as_posix())
    return 0


def natural_order(line: str) -> list[str | int]:
    """As ruff sorts imports: order_2 is before order_10."""
    name = re.sub(r"\W.*", "", line.strip(' "\n'))
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def refuse(sentence: str) -> int:
    print(f"new_handler.py: {sentence}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
