"""The scheduler: which waiting request starts next. It schedules requests; solvers are tables.

Highest priority first, then first come. It owns the waiting line and nothing else: running requests belong to
the slots. Cancelled and expired requests are dropped when they come up, or when the line is full.
"""

import heapq
from collections.abc import Iterator
from itertools import count

from .request import DeadlineExpired, Ticket


class Scheduler:
    """The waiting line of one student. Its owner, the engine, holds a lock around every call."""

    def __init__(self) -> None:
        self._line: list[tuple[int, int, Ticket]] = []
        self._arrival = count()

    def __len__(self) -> int:
        return len(self._line)

    def add(self, ticket: Ticket) -> None:
        """Put a request at the end of its priority."""
        heapq.heappush(self._line, (-ticket.request.priority, next(self._arrival), ticket))

    def drop_cancelled(self) -> None:
        """Forget the requests nobody waits for any more."""
        self._line = [entry for entry in self._line if not entry[2].future.cancelled()]
        heapq.heapify(self._line)

    def take(self, places: int, now_s: float) -> Iterator[Ticket]:
        """Take up to ``places`` requests that still want their sample, in order; fail those past their deadline."""
        while places and self._line:
            ticket = heapq.heappop(self._line)[2]
            deadline_s = ticket.request.deadline_s
            if ticket.future.cancelled():
                continue
            if deadline_s is not None and now_s > deadline_s:
                fail(ticket, DeadlineExpired("the deadline passed while the request was waiting"))
                continue
            places -= 1
            yield ticket


def fail(ticket: Ticket, error: Exception) -> None:
    """End a request without a sample, unless it was cancelled meanwhile."""
    if ticket.future.set_running_or_notify_cancel():
        ticket.future.set_exception(error)
