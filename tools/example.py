"""Renders examples/order-events again, with the default answers: ``python3 tasks.py example``.

The template's path and commit, which differ from machine to machine, are replaced by its address on GitHub.
"""

import json
import shutil
import tempfile
from pathlib import Path

from tools import ROOT
from tools.scaffold import scaffold

EXAMPLES = ROOT / "examples"


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="example-") as scratch:
        service = scaffold(Path(scratch))
        answers = service / ".template-answers.json"
        answers.write_text(normalised(answers.read_text("utf-8")), "utf-8", newline="\n")
        shutil.rmtree(EXAMPLES / service.name, ignore_errors=True)
        shutil.move(service, EXAMPLES)
        print(f"examples/{service.name}")


def normalised(answers: str) -> str:
    """The text of .template-answers.json, without the parts that differ from machine to machine."""
    recorded = json.loads(answers)
    recorded |= {"template": "gh:OWNER/cookiecutter-consumer", "commit": ""}
    return json.dumps(recorded, indent=2) + "\n"


if __name__ == "__main__":
    main()
