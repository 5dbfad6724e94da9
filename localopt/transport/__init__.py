"""What moves when replicas have met: one file for means in place, one for means of copies."""

from .copied import Copied
from .in_place import Compressed, InPlace, fetch_, report_spread

__all__ = ["Compressed", "Copied", "InPlace", "fetch_", "report_spread"]
