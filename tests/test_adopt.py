"""docs/adopt.md, followed on a consumer in the style of aio-pika's tutorial, examples/before: its tests stay green."""

import re
import shutil
import sys
from pathlib import Path

import pytest

from support.documents import SOMEWHERE, steps
from support.rendered import BIN, CACHES, TEMPLATE, run
from support.repositories import IDENTITY, PRESENT_LINE, commit_all, git, without_git

pytestmark = without_git

STOPPED_IN_MID_WORK = """
import asyncio, json, os, signal, subprocess, sys, uuid
import aio_pika

async def main():
    queue = f"invoices-{uuid.uuid4().hex}"
    env = {**os.environ, "INVOICES_QUEUE": queue, "INVOICES_SECONDS": "1"}
    async with await aio_pika.connect(os.environ["AMQP_URL"]) as connection:
        channel = await connection.channel()
        await channel.declare_queue(queue, durable=True)  # as the worker does
        order = aio_pika.Message(json.dumps({"reference": "A-1", "cents": 100}).encode())
        await channel.default_exchange.publish(order, queue)
        async def waiting():
            return (await channel.declare_queue(queue, passive=True)).declaration_result.message_count
        while True:
            worker = subprocess.Popen(
                [sys.executable, "-m", "invoices.worker"], env=env, stdout=subprocess.DEVNULL
            )
            while await waiting():
                await asyncio.sleep(0.05)  # until the worker has it
            worker.send_signal(signal.SIGTERM)
            code = await asyncio.to_thread(worker.wait)
            if code or not await waiting():
                break  # else it went back, as the worker had not begun: once more
        print(code)
        await channel.queue_delete(queue)

asyncio.run(asyncio.wait_for(main(), 60))
"""

SIDE_BY_SIDE = """
import asyncio, json, os, signal, subprocess, sys, uuid
from pathlib import Path
import aio_pika

ORDERS = [f"A-{number}" for number in range(60)]
OLD, FOLDER = sys.argv[1], Path(os.environ["INVOICES_FOLDER"])

async def main():
    queue = f"invoices-{uuid.uuid4().hex}"
    env = {**os.environ, "INVOICES_SECONDS": "0.05", "CONSUMER_BROKER_URL": os.environ["AMQP_URL"]}
    async with await aio_pika.connect(os.environ["AMQP_URL"]) as connection:
        channel = await connection.channel()
        classic = await channel.declare_queue(queue, durable=True)
        for reference in ORDERS:
            order = aio_pika.Message(json.dumps({"reference": reference, "cents": 100}).encode())
            await channel.default_exchange.publish(order, queue)
        old = subprocess.Popen(
            [sys.executable, "-m", "invoices.worker"], stdout=subprocess.DEVNULL,
            env={**env, "INVOICES_QUEUE": queue, "PYTHONPATH": OLD},
        )
        new = subprocess.Popen(
            [sys.executable, "-m", "invoices", "run"], stdout=subprocess.DEVNULL,
            env={**env, "CONSUMER_SOURCE": queue, "CONSUMER_CONCURRENCY": "2"},
        )
        while (await channel.declare_queue(queue, passive=True)).declaration_result.consumer_count < 2:
            await asyncio.sleep(0.05)
        print("both")
        while len([*FOLDER.glob("*.txt")]) < 10:
            await asyncio.sleep(0.05)
        old.send_signal(signal.SIGTERM)
        await asyncio.to_thread(old.wait)
        while {path.stem for path in FOLDER.glob("*.txt")} != {*ORDERS}:
            await asyncio.sleep(0.05)
        new.send_signal(signal.SIGTERM)
        print(await asyncio.to_thread(new.wait))
        left = await channel.declare_queue(queue, durable=True)  # it is the same classic queue
        print(left.declaration_result.message_count)
        for name in (queue, f"{queue}.dead"):
            await channel.queue_delete(name)

asyncio.run(asyncio.wait_for(main(), 60))
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """The consumer before its adoption, in its own repository."""
    project = tmp_path / "invoices"
    shutil.copytree(TEMPLATE / "examples/before", project, ignore=shutil.ignore_patterns(*CACHES))
    git(project, "init", "--quiet")
    commit_all(project, "Before")
    return project


def test_a_consumer_comes_under_the_template_with_its_tests_green(
    project: Path,
    rabbitmq_url: str,
    tmp_path: Path,
    template: Path,
) -> None:
    settings = tmp_path / "cookiecutter.yaml"
    settings.write_text(f"replay_dir: {tmp_path / 'replay'}\ncookiecutters_dir: {tmp_path}\n")
    env = {
        **IDENTITY,
        "AMQP_URL": rabbitmq_url,
        "COOKIECUTTER_CONFIG": str(settings),
        "UV_PYTHON": sys.executable,
    }
    older = f"git+{template.as_uri()} --checkout v0.0.1"
    its_tests = {path: path.read_bytes() for path in (project / "tests").glob("test_*.py")}
    said = {}
    stopped: list[tuple[int, bool]] = []
    for file, text in steps(TEMPLATE / "docs/adopt.md"):
        if file:
            (project / file).write_text(text, encoding="utf-8")
            continue
        command = text.replace(SOMEWHERE, older)
        said[text] = run("sh", "-c", command, cwd=project, env=env).stdout
        if "pytest" in text:  # before the first step, and after the last
            stopped.append(stop_in_mid_work(project, tmp_path / str(len(stopped)), env))
    assert re.search(r"^5 passed", said["uv run pytest -q"], re.M)
    assert sorted(re.findall(r"^ M (\S+)", said["git status --short"], re.M)) == [
        ".gitignore",
        "README.md",
        "pyproject.toml",
        "src/invoices/__init__.py",
    ]
    passed = re.search(r"(\d+) passed", said['uv run pytest -q -m "not slow"'])
    assert passed
    assert int(passed[1]) >= 8, "its own five, the handler's two, and the check for drift"
    assert "files are unmodified" in said["uv run invoices check --vendored"]
    assert {path: path.read_bytes() for path in its_tests} == its_tests
    its_own = run("uv", "run", "pytest", "-q", *map(str, its_tests), cwd=project, env=env).stdout
    assert re.search(r"^5 passed", its_own, re.M)
    assert git(project, "status", "--porcelain") == ""
    updated = run("python3", "tools/update.py", cwd=project, check=False, env=env)
    assert updated.returncode == 0, updated.stdout
    assert PRESENT_LINE in (project / "src/invoices/runtime/logs.py").read_text("utf-8")
    assert {path: path.read_bytes() for path in its_tests} == its_tests
    assert stopped == [(-15, False), (0, True)], "exit code, and whether there is an invoice"
    python, old = project / ".venv" / BIN / "python", TEMPLATE / "examples/before/src"
    env["INVOICES_FOLDER"] = str(tmp_path / "side by side")
    printed = run(str(python), "-c", SIDE_BY_SIDE, str(old), cwd=project, env=env).stdout
    assert printed.split() == ["both", "0", "0"], "exit code of the new one, and what is left"


def stop_in_mid_work(project: Path, folder: Path, env: dict[str, str]) -> tuple[int, bool]:
    python = project / ".venv" / BIN / "python"
    env = {**env, "INVOICES_FOLDER": str(folder)}
    printed = run(str(python), "-c", STOPPED_IN_MID_WORK, cwd=project, env=env).stdout
    return int(printed.splitlines()[-1]), (folder / "A-1.txt").exists()
