"""Refuses answers that break the rules of local_extensions.py, with one sentence for each rule.

Answers that were asked or given have passed those rules already, before the project's folder was made;
this sees the ones that cookiecutter replayed from a file.
"""

import json
import sys
from pathlib import Path

[refusal] = json.loads(r"""{{ [cookiecutter | refusal] | jsonify }}""")

Path(__file__).unlink()  # this rendered copy: cookiecutter would leave it where it is
if refusal:
    sys.exit(refusal)
