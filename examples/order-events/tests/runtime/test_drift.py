# cookiecutter-consumer 0.1.0 | vendored, do not edit it here | SPDX-License-Identifier: 0BSD
"""The vendored files are unmodified; the command ``check --vendored`` checks the same.

Change the template and update, not these files. Or own them: delete this test and runtime/MANIFEST.sha256.
"""

from runtime.operate import vendored


def test_the_vendored_files_are_unmodified() -> None:
    drift, _ = vendored.find_drift()
    assert not drift, "\n".join(["", *drift])
