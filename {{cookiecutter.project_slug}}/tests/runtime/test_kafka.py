# cookiecutter-consumer 0.1.0 | the template's file: updated by the template, so do not edit it here.
"""Not built yet."""
