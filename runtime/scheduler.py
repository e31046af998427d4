"""The scheduler: which waiting request starts next. It schedules requests; solvers are tables.

Highest priority first, then first come. It owns the waiting line and nothing else: running requests belong to
the slots. Cancelled and expired requests are dropped when they come up, or when the line is full. Ending
them is the engine's work, after the lock: a future's callbacks may submit again.
"""

import heapq
from itertools import count

from .request import Ticket


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

    def drop(self, now_s: float) -> list[Ticket]:
        """Take out the requests that are cancelled or past their deadline, wherever they stand."""
        line, self._line, dropped = self._line, [], []
        for entry in line:
            if entry[2].is_over(now_s):
                dropped.append(entry[2])
            else:
                self._line.append(entry)
        heapq.heapify(self._line)
        return dropped

    def take(self, places: int, now_s: float) -> tuple[list[Ticket], list[Ticket]]:
        """Take up to ``places`` requests that still want their sample, in order, and those found over on the way."""
        wanted: list[Ticket] = []
        over: list[Ticket] = []
        while len(wanted) < places and self._line:
            ticket = heapq.heappop(self._line)[2]
            (over if ticket.is_over(now_s) else wanted).append(ticket)
        return wanted, over
