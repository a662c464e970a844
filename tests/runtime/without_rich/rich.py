"""Hides rich, which cookiecutter installs here and no service has: structlog takes a fifth of a start to import it."""

msg = "as in a service"
raise ImportError(msg)
