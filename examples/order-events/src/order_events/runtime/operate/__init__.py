# cookiecutter-consumer 0.1.0 | vendored, do not edit it here | SPDX-License-Identifier: 0BSD
"""Commands that a consuming process does not need: command line, demo, timeline, verification of vendored files."""
