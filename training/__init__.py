"""The training program behind main.py."""
