"""Refuses answers that break the rules of local_extensions.py, with one sentence for each rule.

Answers that were asked or given have passed those rules already, before the project's folder was made;
this sees the ones that cookiecutter replayed from a file.
"""

import json
import sys
from pathlib import Path

[refusal] = json.loads(r"""{{ [cookiecutter | refusal] | jsonify }}""")

Path(
    __file__
).unlink()  # this rendered copy, which cookiecutter would leave in the temporary folder
if refusal:
    sys.exit(refusal)
