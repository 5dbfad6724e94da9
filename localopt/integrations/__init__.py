"""localopt with other tools: one file per tool, imported by name."""
