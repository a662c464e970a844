"""docs/tutorial.md, followed to the letter: every command of it is run, in order, with the documented result."""

import re
from pathlib import Path

import pytest

from support.documents import SOMEWHERE, steps
from support.rendered import TEMPLATE, run
from support.terminal import run_until

PAGE = TEMPLATE / "docs/tutorial.md"


def test_the_tutorial_is_as_it_says(tmp_path: Path) -> None:
    said: list[tuple[str, str]] = []
    folder = tmp_path
    awaited = iter(["shipping", "message_rejected", "billed"])
    (tmp_path / "cookiecutter.yaml").write_text(f"replay_dir: {tmp_path / 'replay'}\n")
    env = {"COOKIECUTTER_CONFIG": str(tmp_path / "cookiecutter.yaml")}
    for file, text in steps(PAGE):
        if file:
            assert (folder / file).exists(), "the tutorial changes a file that was scaffolded"
            (folder / file).write_text(text, encoding="utf-8")
        elif text.startswith("cd "):
            folder = folder / text.removeprefix("cd ")
        elif text.endswith(" run"):
            said.append((text, run_until(next(awaited), text, folder)))
        else:
            command = text.replace(SOMEWHERE, str(TEMPLATE))
            said.append((text, run("sh", "-c", command, cwd=folder, env=env).stdout))

    outputs = [output for command, output in said if command.startswith("uv run order-events")]
    demo, _, check, _, first_run, check_after, _, second_run, dead, purged, *_ = outputs
    billing, third_run = (
        output for command, output in said if command.startswith("CONSUMER_SOURCE=billing uv run")
    )
    assert "published 20, handled 20, dead letters 0" in demo
    assert re.search(r"^ +order-events: 0$", check, re.M)
    events = re.findall(r'"event": "(\w+)"', first_run)
    events = [event for event in events if event != "signal_ignored"]  # uv passes Ctrl-C on as well
    assert events[-6:] == [
        "shipping",
        "stop_requested",
        "draining",
        "shipped",
        "drained",
        "stopped",
    ]
    assert '"exit_code": 0' in first_run.splitlines()[-1]
    assert re.search(r"^ +order-events: 0$", check_after, re.M)
    assert re.search(r"^ +billing: 1$", billing, re.M)
    assert "Field required" in second_run
    assert '"type": "order_created"' in dead
    assert "deleted 1 message from the dead letters of " in purged
    assert '"order": "A-1001"' in third_run
    assert next(awaited, None) is None


@pytest.mark.parametrize("command", ["uvx", "uv run order-events demo", "new-handler", "run"])
def test_the_tutorial_has_its_commands(command: str) -> None:
    assert any(command in text for file, text in steps(PAGE) if not file)
