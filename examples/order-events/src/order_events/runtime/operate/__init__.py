# cookiecutter-consumer 0.1.0 | the template's file: the same bytes in every service, so do not edit it here.
"""Commands that a consuming process does not need: command line, demo, timeline, verification of vendored files."""
