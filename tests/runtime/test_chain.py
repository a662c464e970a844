"""A chain of three services: the second handles the messages of the first, through kills and restarts of each."""

import random
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from itertools import product
from pathlib import Path

import pytest

from harness.process import ServiceProcess
from harness.scene import Scene, assert_clean_shutdown, is_empty, wait_until
from harness.servers import Server
from processes import MISBEHAVING
from runtime.brokers import make_source

pytestmark = pytest.mark.slow

TASKS = 120


class Stage:
    """A service and its destination; it is restarted as often as it is stopped."""

    def __init__(self, scene: Scene, **variables: str) -> None:
        self.scene = scene
        self._variables = variables
        self.process = self.start()

    def start(self) -> ServiceProcess:
        url = self.scene.broker.impatient_url
        self.process = self.scene.start(url=url, concurrency=4, **self._variables)  # type: ignore[arg-type]
        return self.process

    def stop(self, signum: signal.Signals) -> None:
        if signum == signal.SIGKILL:
            self.process.stop(signum)
        else:
            assert_clean_shutdown(self.process, signum)
        self.start()


@pytest.fixture
def scenes(broker: Server, queue: str, tmp_path: Path) -> Iterator[list[Scene]]:
    """The scenes of the three services; each queue exists before a message is published to it."""
    with ExitStack() as stack:
        scenes = []
        for place in range(3):
            (tmp_path / str(place)).mkdir()
            name = f"{queue}-{place}"
            stack.callback(broker.delete, name)
            scenes.append(
                stack.enter_context(Scene(broker, name, tmp_path / str(place), MISBEHAVING))
            )
        yield scenes


def test_a_chain_whose_services_are_all_killed_has_each_effect_once_for_an_idempotent_sink(
    scenes: list[Scene], record_property: Callable[[str, object], None]
) -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    [kind, *_] = make_source(scenes[0].settings).destinations
    sink = Stage(scenes[2], HANDLERS="sink")
    stages = [
        Stage(scenes[1], HANDLERS="relay", FORWARD_TO=f"{kind}:{scenes[2].queue}"),
        Stage(scenes[0], HANDLERS="relay", FORWARD_TO=f"{kind}:{scenes[1].queue}"),
        sink,
    ]
    tasks = scenes[0].publish(TASKS, kind="relay", seconds=0.01)
    effects = scenes[2].ledger
    stops = list(product(stages, [signal.SIGKILL, signal.SIGTERM]))
    chance.shuffle(stops)
    for number, (stage, signum) in enumerate(stops):
        handled = number * TASKS // len(stops) + chance.randrange(TASKS // len(stops))
        wait_until(lambda count=handled: len({*effects.ids("sink")}) >= min(count, TASKS - 1))  # type: ignore[misc]
        stage.stop(signum)
    wait_until(lambda: {*effects.ids("end")} == {*tasks}, seconds=60)
    for scene in scenes:
        wait_until(lambda scene=scene: is_empty(scene))  # type: ignore[misc]
    for stage in stages:
        assert_clean_shutdown(stage.process)
    per_task = Counter(name.rpartition("/")[0] for name in {*effects.ids("sink")})
    assert per_task == Counter(tasks), "each task reached the sink with one id"
    record_property("repeated at the sink", len(effects.ids("sink")) - TASKS)
