"""What the template promises about speed, measured: ``python3 tasks.py bench``."""
