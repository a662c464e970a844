# cookiecutter-consumer {{ cookiecutter._template_version }} | vendored, updated by the template: do not edit it here.
"""Adds a handler for another message type: ``python3 tools/new_handler.py refund_issued``.

Writes the handler and its test from the two stubs in this folder, which you may edit, and adds it to the
registry, handlers/__init__.py. Existing files are never overwritten.

Exit codes: 0 added; 2 the name was refused, and no file was written.
"""

import keyword
import re
import sys
from pathlib import Path

TOOLS = Path(__file__).resolve().parent
PROJECT = TOOLS.parent
PACKAGE = "{{ cookiecutter.package_name }}"
HANDLERS = PROJECT / "src" / PACKAGE / "handlers"
TAKEN = "{{ cookiecutter._taken_handlers | join(' ') }}"
"""Names that the generated handler files use."""
LONGEST_NAME = 40
BLOCKS = ("from . import ", "HANDLERS: ", "EXAMPLES: ")
"""Beginnings of the three blocks in the registry; the handler gets a line in each."""


def main(arguments: list[str]) -> int:
    if len(arguments) != 1:
        sys.exit(refuse("expected one message type, for example refund_issued."))
    [name] = arguments
    class_name = "".join(word.capitalize() for word in name.split("_"))
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or len(name) > LONGEST_NAME:
        return refuse(
            f"{name!r} must consist of lowercase letters a-z, digits and underscores, start with a letter,"
            f" and have at most {LONGEST_NAME} characters."
        )
    if keyword.iskeyword(name) or keyword.iskeyword(class_name):
        return refuse(f"{name!r} is reserved: {name} or {class_name} is a Python keyword.")
    if f" {name} " in f" {TAKEN} ":
        return refuse(f"{name!r} is reserved: the generated handler files use that name.")
    files = {
        HANDLERS / f"{name}.py": TOOLS / "handler.stub",
        PROJECT / f"tests/handlers/test_{name}.py": TOOLS / "test_handler.stub",
    }
    if existing := [path for path in files if path.exists()]:
        return refuse(f"{existing[0].relative_to(PROJECT).as_posix()} already exists.")
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
            return refuse(
                f"{where} contains no block that begins with {beginning!r}; add the handler by hand."
            )
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
    """Sort key: the order in which ruff sorts imports, order_2 before order_10."""
    name = re.sub(r"\W.*", "", line.strip(' "\n'))
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def refuse(sentence: str) -> int:
    print(f"new_handler.py: {sentence}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
