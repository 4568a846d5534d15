"""Circuit breaker: after a few requests in a row were given up, the next ones fail at once.

closed ──a few given up──▶ open ──some seconds──▶ one request may try ──it worked──▶ closed
                             ▲                            │
                             └──────── it did not: longer ┘
"""

import time
from collections.abc import Callable

TOLERATED = 3  # requests in a row that are given up, each after all its retries
FIRST_PAUSE_S, LONGEST_PAUSE_S = 2.0, 60.0


class Breaker:
    """Used by one thread.

    Args:
        clock: seconds that only grow.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._failures = 0
        self._pause_s = FIRST_PAUSE_S
        self._until: float | None = None  # open until then
        self._trying = False

    def wait_s(self) -> float | None:
        """None: go ahead. Else the seconds until somebody may try again."""
        if self._until is None:
            return None
        left = self._until - self._clock()
        if left > 0 or self._trying:
            return max(left, 0.0)
        self._trying = True
        return None

    def succeed(self) -> None:
        """A request was answered."""
        self._failures, self._until, self._trying = 0, None, False
        self._pause_s = FIRST_PAUSE_S

    def fail(self) -> None:
        """A request was given up."""
        self._failures += 1
        if self._trying or (self._failures >= TOLERATED and self._until is None):
            self._until = self._clock() + self._pause_s
            self._pause_s = min(LONGEST_PAUSE_S, 2 * self._pause_s)
        self._trying = False

    def leave(self) -> None:
        """A request was cancelled: nothing is known of the server."""
        self._trying = False
