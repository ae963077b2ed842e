"""When a crashed process is started again, and when it is given up."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field


@dataclass
class RestartPolicy:
    """Delays of 0.5, 2, 8, 30 s between restarts; the fifth crash within five minutes is one too many.

    Crashes older than the window are forgotten, so that a process which ran well for long starts again at once.
    """

    first_seconds: float = 0.5
    factor: float = 4.0
    most_seconds: float = 30.0
    limit: int = 5
    window_seconds: float = 300.0
    _crashes: deque[float] = field(default_factory=deque)

    def crashed(self, now: float) -> float | None:
        """Record a crash at monotonic time `now` (seconds); the delay before the restart, None to give up."""
        self._crashes.append(now)
        while now - self._crashes[0] > self.window_seconds:
            self._crashes.popleft()
        if len(self._crashes) >= self.limit:
            return None
        return min(self.most_seconds, self.first_seconds * self.factor ** (len(self._crashes) - 1))
