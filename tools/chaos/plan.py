"""The plan of a round: drawn from a seed before it begins, so that the same seed repeats it."""

import json
import random
from dataclasses import asdict, dataclass, field
from typing import Any

SLOTS = 2
"""Processes at a time: an ended process is replaced by a new one."""
CONCURRENCY = 4

GENTLE = {"stop": 6, "pause": 2, "add": 1}
ROUGH = {"stop": 4, "kill": 4, "pause": 2, "add": 1, "force": 1, "clock": 2}
OF_NETWORKS = {"cut": 3, "black_hole": 2, "throttle": 2, "refuse": 2}
"""The relative frequency of each fault. The faults of brokers and disks are added by ability."""

GOOD_TASKS = {"work": 60, "fail_once": 2, "retry_once": 2}
BAD_TASKS = {"fail": 1, "reject": 1}
STUBBORN_TASKS = ("hang", "swallow", "block", "block")
MOST_STUBBORN = 6
"""A handler of the first two kinds occupies a slot of its process until the process ends, so they are few."""


@dataclass(frozen=True)
class Event:
    at_seconds: float
    what: str
    details: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return json.dumps({"at": round(self.at_seconds, 3), "event": self.what, **self.details})


@dataclass(frozen=True)
class Plan:
    seed: int
    gentle: bool
    seconds: float
    events: list[Event]

    def text(self) -> str:
        about = {key: value for key, value in asdict(self).items() if key != "events"}
        return "\n".join([json.dumps(about), *map(str, self.events)]) + "\n"


def draw(seed: int, abilities: set[str], seconds: float) -> Plan:
    """The plan of one round. ``abilities``: proxy, broker_kill, disk_full."""
    chance = random.Random(seed)
    gentle = chance.random() < 0.3
    weights = dict(GENTLE if gentle else ROUGH)
    if not gentle and "proxy" in abilities:
        weights |= OF_NETWORKS
    if not gentle:
        weights |= {name: 2 for name in ("broker_kill", "disk_full") if name in abilities}
    events, at = [], 1.0
    while (at := at + chance.uniform(0.1, 1.6)) < seconds - 2:
        (what,) = chance.choices([*weights], [*weights.values()])
        events.append(Event(at, what, _details(what, chance, gentle)))
    events += _tasks(chance, gentle, seconds)
    return Plan(seed, gentle, seconds, sorted(events, key=lambda event: event.at_seconds))


def _details(what: str, chance: random.Random, gentle: bool) -> dict[str, Any]:
    slot = chance.randrange(SLOTS)
    seconds = round(chance.uniform(0.2, 3), 2)
    match what:
        case "stop":
            return {
                "slot": slot,
                "signum": chance.choice(["SIGTERM", "SIGTERM", "SIGINT", "SIGHUP"]),
            }
        case "kill" | "force" | "add":
            return {"slot": slot}
        case "pause":  # shorter than a lease, if no message may be done twice
            return {"slot": slot, "seconds": seconds}
        case "clock":
            return {"slot": slot, "by": round(chance.uniform(-5, 5), 2)}
        case "throttle":
            return {
                "proxy": slot,
                "seconds": seconds,
                "bytes_per_second": chance.choice([200, 5000]),
            }
        case "cut":
            return {"proxy": slot}
        case "broker_kill" | "disk_full":
            return {"seconds": seconds}
    return {"proxy": slot, "seconds": seconds}


def _tasks(chance: random.Random, gentle: bool, seconds: float) -> list[Event]:
    events, number, stubborn, at = [], 0, 0, 0.0
    kinds = GOOD_TASKS | BAD_TASKS
    while (at := at + chance.uniform(0.05, 0.6)) < seconds:
        tasks = []
        for _ in range(chance.randint(1, 40)):
            (how,) = chance.choices([*kinds], [*kinds.values()])
            if not gentle and stubborn < MOST_STUBBORN and chance.random() < 0.01:
                how, stubborn = chance.choice(STUBBORN_TASKS), stubborn + 1
            spread = chance.choice([0, 0, 0.02, 0.3])
            tasks.append({"id": f"{how}-{number}", "how": how, "seconds": round(spread, 2)})
            if how == "block":
                tasks[-1]["seconds"] = round(chance.uniform(0.3, 2.5), 2)
            number += 1
        events.append(Event(at, "publish", {"tasks": tasks}))
    return events
