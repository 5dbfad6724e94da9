"""A run on disk: saving it, resuming it, exporting its weights."""
