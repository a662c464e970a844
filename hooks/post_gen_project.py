"""Turns the rendered tree into one service: writes handlers, deletes files of other answers, writes the manifest.

Standard library only, offline. A second run changes nothing, and existing files are never overwritten.
"""

import base64
import hashlib
import itertools
import json
import runpy
import shutil
from collections.abc import Iterator
from pathlib import Path

ANSWERS = json.loads(r"""{{ cookiecutter | public_answers | jsonify }}""")
TYPES = dict(
    json.loads(r"""{{ (cookiecutter.handlers | handler_types).items() | list | jsonify }}""")
)
BROKERS = json.loads(r"""{{ cookiecutter._brokers | jsonify }}""")
TELEMETRIES = json.loads(r"""{{ cookiecutter._telemetries | jsonify }}""")
DEPLOYS = json.loads(r"""{{ cookiecutter._deploys | jsonify }}""")
CIS = json.loads(r"""{{ cookiecutter._cis | jsonify }}""")

PACKAGE = Path("src", ANSWERS["package_name"])
RUNTIME = PACKAGE / "runtime"
RUNTIME_TESTS = Path("tests/runtime")
KUBERNETES = Path("deploy/kubernetes")
STUBS = Path("stubs")
TOOLS = Path("tools")
MANIFEST = RUNTIME / "MANIFEST.sha256"
SAVED = Path(".saved-before-the-render")
NEW_HANDLER = runpy.run_path(str(TOOLS / "new_handler.py"))


def main() -> None:
    Path(__file__).unlink()  # the rendered copy; cookiecutter does not delete it
    saved = json.loads(read(SAVED)) if SAVED.exists() else {}
    SAVED.unlink(missing_ok=True)
    if (STUBS / "registry.py").exists():
        for cache in caches():
            shutil.rmtree(cache, ignore_errors=True)
        write_handlers()
        for file in ("handler", "test_handler"):  # for tools/new_handler.py
            write(TOOLS / f"{file}.stub", read(STUBS / ANSWERS["handler_stub"] / f"{file}.py"))
        unwanted = [*others(BROKERS, "broker"), *others(TELEMETRIES, "telemetry")]
        unwanted += [*other_deploys(), *other_ci(), *stubs(), PACKAGE / "handlers.py"]
        for path in unwanted:
            path.unlink()  # fails if it does not exist: a table in cookiecutter.json is wrong
            remove_empty_folders(path.parent)
        for path in (*unwanted, PACKAGE / "settings.py", Path("tests/test_rehearsal.py")):
            if (content := saved.get(path.as_posix())) is not None:  # the team's own file
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(base64.b64decode(content))
        write_manifest()
    print_next_steps()


def stubs() -> list[Path]:
    kinds = ("json", "raw", "batch", "blocking")
    files = [f"{kind}/{file}.py" for kind in kinds for file in ("handler", "test_handler")]
    return [STUBS / file for file in (*files, "registry.py", "ruff.toml")]


def write_handlers() -> None:
    """Write, from the stubs, one handler file and one test file per name, and the registry of handlers."""
    stub = STUBS / ANSWERS["handler_stub"]
    for name in TYPES:
        write(PACKAGE / f"handlers/{name}.py", named(read(stub / "handler.py"), name))
        write(Path(f"tests/handlers/test_{name}.py"), named(read(stub / "test_handler.py"), name))

    def for_each_handler(line: str) -> str:
        if "order_created" not in line:
            return line
        is_import = line.endswith("    order_created,\n")
        names = sorted(TYPES, key=NEW_HANDLER["natural_order"]) if is_import else [*TYPES]
        keyed = [line.replace('"order_created"', f'"{TYPES[name]}"') for name in names]
        return "".join(map(named, keyed, names))

    lines = read(STUBS / "registry.py").splitlines(keepends=True)
    write(PACKAGE / "handlers/__init__.py", "".join(map(for_each_handler, lines)))


def named(stub: str, name: str) -> str:
    """The stub with the names of this service and this handler in place of order_events and order_created."""
    return str(NEW_HANDLER["named"](stub, ANSWERS["package_name"], name, TYPES[name]))


def others(table: dict[str, dict[str, list[str]]], question: str) -> set[Path]:
    """The files that belong only to choices that were not selected."""
    files = {
        name: {RUNTIME / file for file in choice["runtime"]}
        | {RUNTIME_TESTS / file for file in choice.get("tests", [])}
        for name, choice in table.items()
    }
    return set().union(*files.values()) - files[ANSWERS[question]]


def other_deploys() -> set[Path]:
    """The deployment files that belong only to other answers."""
    answers = itertools.product(DEPLOYS, BROKERS, TELEMETRIES)
    return set[Path]().union(*(files_of(*one) for one in answers)) - files_of(
        ANSWERS["deploy"], ANSWERS["broker"], ANSWERS["telemetry"]
    )


def files_of(deploy: str, broker: str, telemetry: str) -> set[Path]:
    """The deployment files of these answers."""
    slug, package = ANSWERS["project_slug"], ANSWERS["package_name"]
    files = {Path(file.format(slug=slug, package=package)) for file in DEPLOYS[deploy]}
    files |= {*map(Path, TELEMETRIES[telemetry]["deploy"])}
    if deploy == "kubernetes":
        files |= {KUBERNETES / file for file in BROKERS[broker]["kubernetes"]}
        files |= {*map(Path, TELEMETRIES[telemetry]["kubernetes"])}
    return files


def other_ci() -> Iterator[Path]:
    """The files of the CI providers that were not selected."""
    for name, files in CIS.items():
        if name != ANSWERS["ci"]:
            yield from map(Path, files)


def remove_empty_folders(folder: Path) -> None:
    """Remove this folder and its parents, as long as they are empty."""
    while folder != Path() and not any(folder.iterdir()):
        folder.rmdir()
        folder = folder.parent


def caches() -> list[Path]:
    """The cache folders that tools create when they run inside the template."""
    names = ("__pycache__", ".hypothesis", ".mypy_cache", ".pytest_cache", ".ruff_cache")
    folders = [Path(), STUBS]
    folders += [one for top in ("src", "tests", STUBS) for one in Path(top).rglob("*/")]
    return [cache for folder in folders for name in names if (cache := folder / name).is_dir()]


def write_manifest() -> None:
    """Write the hash of each vendored file in the format of sha256sum; tests/runtime/test_drift.py reads it."""
    files = [*RUNTIME.rglob("*"), *RUNTIME_TESTS.rglob("*")]
    paths = sorted(file.as_posix() for file in files if file.is_file() and file != MANIFEST)
    hashes = (hashlib.sha256(Path(path).read_bytes()).hexdigest() for path in paths)
    MANIFEST.write_text(
        "".join(f"{sha256}  {path}\n" for sha256, path in zip(hashes, paths, strict=True)),
        encoding="utf-8",
        newline="\n",
    )


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def write(path: Path, text: str) -> None:
    if path.exists():
        print(f"already exists, kept: {path.as_posix()}")
    else:
        path.parent.mkdir(exist_ok=True)  # git stores no empty folders
        path.write_text(text, encoding="utf-8", newline="\n")


def print_next_steps() -> None:
    slug = ANSWERS["project_slug"]
    handler = (PACKAGE / f"handlers/{next(iter(TYPES))}.py").as_posix()
    locks = {"uv lock": "writes uv.lock: commit it, because the deployment installs its versions"}
    steps = {
        **({} if ANSWERS["deploy"] == "none" else locks),
        f"uv run {slug} demo": "handles sample messages on the embedded broker; Ctrl-C shuts it down",
        "uv run pytest": "runs this service's tests, with real signals",
    }
    width = max(map(len, steps))
    lines = [f"    {command:{width}}    {effect}" for command, effect in steps.items()]
    print(
        f"\n{slug} is ready. Next steps:\n\n    cd {slug}\n"
        + "\n".join(lines)
        + f"\n\nThen open {handler} and write your handler there.\n"
        "README.md has the same commands for a plain venv with pip."
    )


main()
