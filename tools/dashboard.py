"""Draws the panels of a service's dashboard, for ``python3 tasks.py pictures [FOLDER]``; needs prometheus.

A rendered service runs for a minute and a quarter: its dependency is down for a while, some messages are rejected, some
block the event loop, then SIGTERM. A Prometheus scrapes it, and answers the queries of its own dashboard.json.
"""

import json
import math
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from harness.servers.local import free_port
from tools.demo import Run
from tools.pictures import FOLDER, text
from tools.scaffold import install, scaffold, user_environment

HANDLER = '''"""The picture's handler: each message says how it ends."""

import asyncio
import os
import time
from functools import partial
from pathlib import Path

from ..runtime.message import Reject

EXAMPLE = b"0.2"


async def handle(body: bytes) -> None:
    if body == b'"block"':
        time.sleep(1.5)
    elif body == b'"reject"':
        raise Reject("no such customer")
    else:
        await asyncio.sleep(float(body))
        if Path(os.environ["AWAY"]).exists():
            raise ConnectionError("the carrier is away")
'''
PROMETHEUS = """\
global: {scrape_interval: 1s}
scrape_configs: [{job_name: order-events, static_configs: [{targets: ["127.0.0.1:PORT"]}]}]
"""
AWAY, BACK, BLOCKING, STOPPED = 20, 30, (60, 65), 75  # seconds after the start

DASHBOARD = "deploy/prometheus/dashboard.json"

Ask = Callable[..., Any]
"""Takes a path of Prometheus's API and the parameters of the query; returns the data of its answer."""


def main(arguments: list[str]) -> int:
    if (program := shutil.which("prometheus")) is None:
        print("dashboard.svg: not drawn, since prometheus is not installed")
        return 0
    folder = Path(arguments[0]) if arguments else FOLDER
    with tempfile.TemporaryDirectory(prefix="dashboard-") as scratch:
        answers = ("broker=sqlite", "handler_stub=raw", "deploy=none")
        project = scaffold(Path(scratch), *answers, handler=HANDLER)
        service = install(project)
        probe_port, port = free_port(), free_port()
        (project / "p.yml").write_text(PROMETHEUS.replace("PORT", str(probe_port)))
        options = ("--config.file=p.yml", "--storage.tsdb.path=data")
        command = [program, *options, f"--web.listen-address=127.0.0.1:{port}"]
        with subprocess.Popen(command, cwd=project, stderr=subprocess.DEVNULL) as server:
            try:
                began = time.time()
                live(service, project, probe_port)
                panels = json.loads((project / DASHBOARD).read_text("utf-8"))["panels"]
                drawing = drawn(panels, partial(ask, port), began, time.time(), "10s")
            finally:
                server.terminate()
    (folder / "dashboard.svg").write_text(drawing, encoding="utf-8", newline="\n")
    print("dashboard.svg: drawn")
    return 0


def live(service: Path, folder: Path, probe_port: int) -> None:
    """Run the minute and a quarter of the picture."""
    away = folder / "away"
    environment = {
        **user_environment(),
        "CONSUMER_BROKER_URL": f"sqlite:///{(folder / 'queue.db').as_posix()}",
        "CONSUMER_PROBE_PORT": str(probe_port),
        "AWAY": str(away),
    }
    run = Run(service, environment)
    publish = [str(service), "publish", "-"]
    with subprocess.Popen(publish, env=environment, stdin=subprocess.PIPE, text=True) as publisher:
        assert publisher.stdin
        began = time.monotonic()
        for second in range(STOPPED):
            if second in (AWAY, BACK):
                (away.touch if second == AWAY else away.unlink)()
            lines = ["0.2"] * 20 + ['"reject"'] * (second % 7 == 0)
            lines += ['"block"'] * (second in BLOCKING) + ["8"] * (second == STOPPED - 2)
            publisher.stdin.write("\n".join([*lines, ""]))
            publisher.stdin.flush()
            time.sleep(max(0, began + second + 1 - time.monotonic()))
    run.process.send_signal(signal.SIGTERM)
    run.wait()


def ask(port: int, path: str, **query: object) -> Any:
    url = f"http://127.0.0.1:{port}/api/v1/{path}?{urlencode(query)}"
    with urllib.request.urlopen(url, timeout=10) as answer:
        return json.load(answer)["data"]


WIDTH, HEIGHT, GAP, HEAD, FOOT = 372, 96, 16, 24, 34
MOST_NAMES = 4
UNITS = {"cps": "/s", "s": " s"}
STYLE = """
text { font: 12px system-ui, sans-serif; fill: var(--c, #24292f) } .title { font-weight: 600 } text[class^=c] { font-size: 11px }
polyline { fill: none; stroke: var(--c); stroke-width: 1.5 } .frame { fill: none; stroke: #8c959f; stroke-width: .5 }
.c0 { --c: #0969da } .c1 { --c: #9a6700 } .c2 { --c: #cf222e } .c3 { --c: #1a7f37 }
@media (prefers-color-scheme: dark) { text { fill: var(--c, #e6edf3) }
.c0 { --c: #58a6ff } .c1 { --c: #d29922 } .c2 { --c: #f85149 } .c3 { --c: #3fb950 } }
"""

Curve = tuple[str, list[tuple[float, float]]]


def drawn(panels: list[dict[str, Any]], ask: Ask, began: float, ended: float, rate: str) -> str:
    """The SVG: pairs of panels, each with the curves of Prometheus's answers to its queries."""
    rows = math.ceil(len(panels) / 2)
    height = rows * (HEAD + HEIGHT + FOOT)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {2 * WIDTH + GAP} {height}" role="img"'
        f' aria-label="The panels of the dashboard"><style>{STYLE}</style>'
    ]
    for number, panel in enumerate(panels):
        left, top = number % 2 * (WIDTH + GAP), number // 2 * (HEAD + HEIGHT + FOOT) + HEAD
        curves = list(curves_of(panel, ask, began, ended, rate))
        most = max((value for _, points in curves for _, value in points), default=0) or 1
        unit = UNITS.get(panel["fieldConfig"]["defaults"]["unit"], "")
        parts += [
            text(left, top - 7, panel["title"], "title"),
            text(left + WIDTH, top - 7, f"{most:.3g}{unit}", "small", "end"),
            f'<rect class="frame" x="{left}" y="{top}" width="{WIDTH}" height="{HEIGHT}"/>',
        ]
        x = float(left)
        for place, (name, points) in enumerate(curves):
            path = " ".join(
                f"{left + WIDTH * (at - began) / (ended - began):.1f},{top + HEIGHT * (1 - value / most):.1f}"
                for at, value in points
            )
            parts.append(f'<polyline class="c{place % 4}" points="{path}"/>')
            if place < MOST_NAMES:
                parts.append(text(x, top + HEIGHT + 15, name, f"c{place % 4}"))
                x += 12 + 6 * len(name)
    return "\n".join([*parts, "</svg>", ""])


def curves_of(
    panel: dict[str, Any], ask: Ask, began: float, ended: float, rate: str
) -> Iterator[Curve]:
    for target in panel["targets"]:
        query = target["expr"].replace("$__rate_interval", rate).replace("$instance", ".+")
        step = max(1, (ended - began) / 180)
        answer = ask("query_range", query=query, start=began, end=ended, step=step)
        for one in answer["result"]:
            points = [(float(at), float(value)) for at, value in one["values"]]
            points = [(at, value) for at, value in points if math.isfinite(value)]
            labels = {k: v for k, v in one["metric"].items() if k not in ("instance", "pod")}
            legend = "" if target["legendFormat"] == "__auto" else target["legendFormat"]
            if points:
                yield legend or " ".join(labels.values()) or "the process", points


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
