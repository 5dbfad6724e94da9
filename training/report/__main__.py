"""``python -m training.report``."""

import sys

from .command import main

sys.exit(main())
