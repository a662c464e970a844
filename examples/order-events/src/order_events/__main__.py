"""The command line: ``order-events``, or ``python -m order_events``."""

import sys

from .handlers import EXAMPLES, HANDLERS, lifespan
from .runtime.operate.cli import main
from .settings import Settings


def run() -> int:
    return main(
        name="order-events",
        handlers=HANDLERS,
        examples=EXAMPLES,
        settings=Settings,
        lifespan=lifespan,
    )


if __name__ == "__main__":
    sys.exit(run())
