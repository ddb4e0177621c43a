"""Step 8, monitoring: what a run says to people, to its metrics file and to trackers; alarms and profiles."""

from .console import Console
from .records import Monitor, memory_gb, records, warnings_of

__all__ = ["Console", "Monitor", "memory_gb", "records", "warnings_of"]
