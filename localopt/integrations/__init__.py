"""localopt beside other tools: one file per tool, imported by name."""
