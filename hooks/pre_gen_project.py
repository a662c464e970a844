"""Validates the answers once more: one sentence for the first answer that local_extensions.py refuses.

Answers from prompts or the command line were validated before cookiecutter created the project's directory.
This hook catches the answers of `--replay`, which skips that step.
"""

import json
import sys
from pathlib import Path

[refusal] = json.loads(r"""{{ [cookiecutter | refusal] | jsonify }}""")

Path(__file__).unlink()  # the rendered copy; cookiecutter does not delete it
if refusal:
    sys.exit(refusal)
