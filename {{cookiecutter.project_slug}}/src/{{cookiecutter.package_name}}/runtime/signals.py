# cookiecutter-consumer 0.1.0 | vendored, do not edit it here | SPDX-License-Identifier: 0BSD
"""Which signals shut the service down, and which of them force it."""

import signal
from signal import Signals

PAIR_SECONDS = 0.3
"""Supervisors send SIGINT and SIGTERM as a pair: a SIGINT this soon after the first signal does not force."""


def shutdown_signals() -> list[Signals]:
    """The signals to handle: not a SIGHUP that nohup ignores, so that the process outlives the terminal."""
    # SIGHUP, a closed terminal, shuts down as SIGTERM does; SIGBREAK is how Windows ends a process group.
    names = ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK")
    signals = [Signals[name] for name in names if name in Signals.__members__]
    return [s for s in signals if s.name != "SIGHUP" or signal.getsignal(s) is not signal.SIG_IGN]


def forces(signum: Signals, seconds_after_first: float) -> bool:
    """Whether this signal, after the one that began the shutdown, ends the drain at once."""
    return signum is Signals.SIGINT and seconds_after_first >= PAIR_SECONDS


def name_of(reason: Signals | str | None) -> str:
    """The reason of a `CancellationEvent` as the log shows it."""
    return reason.name if isinstance(reason, Signals) else str(reason)
