"""Requests to stop or to save: signals, a time limit, files touched in the run folder."""

import math
import os
import time
from pathlib import Path

LOOK_SECONDS = (
    1.0  # between two looks for OUT/STOP and OUT/SAVE, which may lie on a slow file system
)


class StopRequests:
    """Requests of this rank to stop or to save. A request of one rank applies to all ranks.

    reasons: reasons of this rank to stop. Signal handlers append to this list.
    """

    def __init__(
        self, out: Path, is_rank0: bool, reasons: list[str], began: float, max_minutes: float | None
    ):
        """began: `time.monotonic()` at the start of the attempt, for max_minutes."""
        self.reasons = reasons
        self._out = out
        self._is_rank0 = is_rank0
        self._began = began
        self._max_minutes = max_minutes
        self._looked_at: dict[str, float] = {}
        self._kept: set[str] = set()  # files that could not be removed

    def should_stop(self) -> bool:
        """Return whether this rank asks to save and stop. Adds to `reasons`."""
        minutes = self._max_minutes
        if minutes is not None and time.monotonic() - self._began >= 60 * minutes:
            self.reasons.append(f"--max-minutes {minutes}")
        if self._take_file("STOP"):
            self.reasons.append("OUT/STOP")
        return bool(self.reasons)

    def should_save(self) -> bool:
        """Return whether this rank asks to save. Removes OUT/SAVE."""
        return self._take_file("SAVE")

    def _take_file(self, name: str) -> bool:
        """Return whether OUT/name exists, and remove it. Rank 0 checks once per LOOK_SECONDS.

        A folder is no request. A file that cannot be removed is one request.
        """
        now = time.monotonic()
        if not self._is_rank0 or now - self._looked_at.get(name, -math.inf) < LOOK_SECONDS:
            return False
        self._looked_at[name] = now
        path = self._out / name
        is_request = os.path.lexists(path) and (path.is_symlink() or not path.is_dir())
        if not is_request or name in self._kept:
            return False
        try:
            path.unlink(missing_ok=True)
        except OSError:  # one request, not one per second
            self._kept.add(name)
        return True
