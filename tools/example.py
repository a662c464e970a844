"""Renders examples/order-events anew, with the default answers: ``python3 tasks.py example``.

So that people can look before they run. What differs from place to place, where the template lay and its commit, is
written as it is for somebody who takes the newest from GitHub.
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
    """The text of .template-answers.json, without what depends on where it was rendered."""
    recorded = json.loads(answers)
    recorded |= {"template": "gh:OWNER/cookiecutter-consumer", "commit": ""}
    return json.dumps(recorded, indent=2) + "\n"


if __name__ == "__main__":
    main()
