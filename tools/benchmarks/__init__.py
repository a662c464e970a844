"""Measurements of the template's promises about speed: ``python3 tasks.py bench``."""
