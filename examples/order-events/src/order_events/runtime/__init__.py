# cookiecutter-consumer 0.1.0 | the template's file: the same bytes in every service, so do not edit it here.
"""The runtime: takes messages, runs handlers, settles, and stops without losing anything."""
