# cookiecutter-consumer 0.1.0 | vendored, identical in every service: do not edit it here.
"""Commands that a consuming process does not need: command line, demo, timeline, verification of vendored files."""
