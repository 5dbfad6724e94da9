"""How long tests wait for what should come: far longer than it takes, for only failures wait."""

PATIENCE = 180.0  # seconds; pytest's own limit of a test is longer
