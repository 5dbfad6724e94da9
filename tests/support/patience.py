"""How long tests wait for what should come: far longer than it takes, for only failures wait."""

import os

# Seconds; pytest's own limit of a test is longer. Less where failures are sought: tests.faults.
PATIENCE = float(os.environ.get("PATIENCE", "180"))
