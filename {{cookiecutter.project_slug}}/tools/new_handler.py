# cookiecutter-consumer {{ cookiecutter._template_version }} | vendored, do not edit it here | SPDX-License-Identifier: 0BSD
"""Adds a handler for another message type: ``python3 tools/new_handler.py com.acme.order.created.v1``.

Pass the type as producers write it: it becomes the key in HANDLERS and EXAMPLES of handlers/__init__.py. The handler,
here order_created.py, and its test are written from the two stubs in this folder, which you may edit. Existing files
are never overwritten.

Exit codes: 0 added; 2 the type was refused, and no file was written.
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
LONGEST_NAME, LONGEST_TYPE = 40, 100  # characters
ENTRY = re.compile(r'^    "(.+)": ([\w.]+),', re.M)
ADVICE = """
Until now, the handler of {0!r} got every message. It still gets those of all other types, or of none: by the key "*" in
HANDLERS. Without that line they become dead letters.
"""


def main(arguments: list[str]) -> int:
    if len(arguments) != 1:
        return refuse("expected one message type, for example refund_issued.")
    [message_type] = arguments
    name = name_of(message_type)
    if (HANDLERS / f"{name}.py").exists():  # of order.created.v1, for order.created.v2
        name = name_of(message_type, with_version=True)
    if reason := refusal(message_type, name, TAKEN.split()):
        return refuse(f"{reason}.")
    files = {
        HANDLERS / f"{name}.py": TOOLS / "handler.stub",
        PROJECT / f"tests/handlers/test_{name}.py": TOOLS / "test_handler.stub",
    }
    if existing := [path for path in files if path.exists()]:
        return refuse(f"{existing[0].relative_to(PROJECT).as_posix()} already exists.")
    registry = HANDLERS / "__init__.py"
    where, entered = registry.relative_to(PROJECT).as_posix(), registry.read_text(encoding="utf-8")
    if f'"{message_type}"' in entered:
        return refuse(f"{where} already contains {message_type!r}.")
    advice = ""
    lines = {  # one for each of three blocks, by its beginning
        "from . import ": f"    {name},\n",
        "HANDLERS: ": f'    "{message_type}": {name}.handle,\n',
        "EXAMPLES: ": f'    "{message_type}": {name}.EXAMPLE,\n',
    }
    for beginning, line in lines.items():
        pattern = "^" + re.escape(beginning) + r".*[({]\n((?:    .*\n)*)[)}]"
        block = re.search(pattern, entered, re.M)
        inside = [*(block[1].splitlines(keepends=True) if block else ()), line]
        if beginning == "from . import ":
            inside.sort(key=natural_order)
        elif block and beginning == "HANDLERS: " and len(re.findall('^    "', block[1], re.M)) == 1:
            if (only := ENTRY.search(block[1])) and only[1] != "*":
                inside.append(f'    "*": {only[2]},\n')
                advice = ADVICE.format(only[1])
            block = only and block
        if block is None:
            known = f"no block that begins with {beginning!r} and has one line for each handler"
            return refuse(f"{where} contains {known}; add the handler by hand.")
        entered = entered[: block.start(1)] + "".join(inside) + entered[block.end(1) :]
    for path, stub in files.items():
        text = named(stub.read_text(encoding="utf-8"), PACKAGE, name, message_type)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8", newline="\n")
    registry.write_text(entered, encoding="utf-8", newline="\n")
    for path in (*files, registry):
        print(path.relative_to(PROJECT).as_posix())
    print(advice, end="")
    return 0


def name_of(message_type: str, *, with_version: bool = False) -> str:
    """The name of a handler's files: order_created for OrderCreated, order-created and com.acme.order.created.v1."""
    words_apart = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|[\s_-]+", "_", message_type).lower()
    parts = [part.strip("_") for part in re.split("[./:]", words_apart) if part.strip("_")]
    version = [parts.pop()] if len(parts) > 1 and re.fullmatch(r"v\d+", parts[-1]) else []
    parts = parts[-1:] if "_" in "".join(parts[-1:]) else parts[-2:]
    name = "_".join(parts + version * with_version)
    # Pytest would collect the model of the one, and load the other.
    return f"on_{name}" if name.startswith("test") or name == "conftest" else name


def class_name(name: str) -> str:
    """``order_created`` becomes OrderCreated."""
    joined = "".join(word.capitalize() for word in name.split("_"))
    return f"{joined}Event" if joined.isupper() and len(joined) > 1 else joined  # else a constant


def refusal(message_type: str, name: str, taken: list[str]) -> str:
    """Why this type cannot have a handler of this name; empty if it can."""
    shown = repr(message_type if len(message_type) <= 60 else f"{message_type[:60]}...")
    words = (name, class_name(name))
    if not re.fullmatch(r"[a-z_][\w.:/ -]*", message_type, re.A | re.I) or not name[:1].isalpha():
        return f"{shown} must consist of letters a-z, digits and _-.:/, and start with a letter"
    if len(name) > LONGEST_NAME or len(message_type) > LONGEST_TYPE:
        return f"{shown} is too long: {name!r} may have {LONGEST_NAME} characters"
    if keyword_used := next(filter(keyword.iskeyword, words), ""):
        return f"{shown} would need the name {keyword_used}, which is a Python keyword"
    if re.fullmatch(r"con|prn|aux|nul|(com|lpt)[0-9]", name):
        return f"{shown} is a reserved device name on Windows"
    return f"{shown} is reserved: handlers use the name {name} themselves" if name in taken else ""


def named(stub: str, package: str, name: str, message_type: str) -> str:
    """The stub with these names in place of order_events and order_created."""
    words = {"order_events": package, "order_created": name, "OrderCreated": class_name(name)}
    text = stub.replace("type ``order_created``", f"type ``{message_type}``")
    return re.sub(rf"(?<!type ``)\b({'|'.join(words)})\b", lambda found: words[found[0]], text)


def natural_order(line: str) -> list[str | int]:
    """Sort key: the order in which ruff sorts imports, order_2 before order_10."""
    name = re.sub(r"\W.*", "", line.strip(' "\n'))
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def refuse(sentence: str) -> int:
    print(f"new_handler.py: {sentence}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
