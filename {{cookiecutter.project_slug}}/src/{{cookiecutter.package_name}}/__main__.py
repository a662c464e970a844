"""The command line: ``{{ cookiecutter.project_slug }}``, or ``python -m {{ cookiecutter.package_name }}``."""

import sys

from .handlers import EXAMPLES, HANDLERS, lifespan
from .runtime.operate.cli import main
from .settings import Settings


def run() -> int:
    return main(
        name="{{ cookiecutter.project_slug }}",
        handlers=HANDLERS,
        examples=EXAMPLES,
        settings=Settings,
        lifespan=lifespan,
    )


if __name__ == "__main__":
    sys.exit(run())
