"""The training program behind main.py: config, engine, loop, schedules, models, evaluation, records."""
