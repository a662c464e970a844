"""The command line: ``{{ cookiecutter.project_slug }}``, or ``python -m {{ cookiecutter.package_name }}``."""

import sys

from .runtime.operate.cli import Service, main

if sys.argv[1:] == ["run", "--reload"]:  # starts also with an error in your settings or handlers
    sys.exit(main(Service(name="{{ cookiecutter.project_slug }}", handlers={})))

from .settings import Settings

try:
    from . import handlers
except ImportError as error:
    if error.name != f"{__package__}.handlers":
        raise
    missing = str(error).split("'")[1]
    print(f"handlers/{missing}.py is imported, but does not exist", file=sys.stderr)
    sys.exit(2)


def run() -> int:
    service = Service(
        name="{{ cookiecutter.project_slug }}",
        handlers=handlers.HANDLERS,
        settings_class=Settings,
        lifespan=getattr(handlers, "lifespan", None),
        around=getattr(handlers, "around", None),
        decoders=getattr(handlers, "DECODERS", None),
        examples=getattr(handlers, "EXAMPLES", {}),
        effects=getattr(handlers, "effects", None),
        failure=getattr(handlers, "FAILURE", ConnectionError),
    )
    return main(service)


if __name__ == "__main__":
    sys.exit(run())
