"""The scheduler: which waiting request starts next. It schedules requests; solvers are tables.

Higher priorities first, but time spent in line counts: every ``ageing_s`` of it is worth one level, so nobody starves.
Within a level the caller who was given least goes first, and each caller's own requests in the order they came. That
is start-time fair queueing (Goyal, Vin and Cheng 1996): a request is due when its caller's one before it would be
done, were every caller served at once, and the earliest due starts. With one caller: first come, first served.

The scheduler owns the waiting line and nothing else: running requests belong to the slots. Cancelled and expired
requests are dropped when they come up, or when the line is full. Ending them is the engine's work, after the lock: a
future's callbacks may submit again.
"""

import heapq
from collections import Counter
from collections.abc import Hashable, Iterator
from concurrent.futures import Future
from itertools import count

from .request import Request, Sample, Ticket

AGEING_S = 10.0


class Shares:
    """Who is next, of those who share something: whoever was given least of it while there was a line."""

    def __init__(self) -> None:
        self._now = 0.0  # virtual time: when the one that was served last was due
        self._end: dict[Hashable, float] = {}

    def due(self, name: Hashable) -> float:
        """When a sharer's next piece is due. One that was away starts now, and saves up nothing."""
        return max(self._now, self._end.get(name, 0.0))

    def charge(self, name: Hashable, due: float, cost: float) -> None:
        """A piece that is due then costs so much, by the sharer's weight."""
        self._end[name] = due + cost

    def serve(self, due: float) -> None:
        """The piece that was due then is served."""
        self._now = max(self._now, due)

    def forget(self, name: Hashable) -> None:
        """A sharer is gone."""
        self._end.pop(name, None)


class _Level:
    """The line of one priority."""

    def __init__(self) -> None:
        self.line: list[tuple[float, int, Ticket]] = []
        self.shares = Shares()


class Scheduler:
    """The waiting line of one student. Its owner, the engine, holds a lock around every call.

    Args:
        ageing_s: time in line that is worth one level of priority.
    """

    def __init__(self, ageing_s: float = AGEING_S) -> None:
        self._ageing_s = ageing_s
        self._levels: dict[int, _Level] = {}  # none is empty
        self._arrival = count()
        self._num = 0
        self._of_caller: Counter[str] = Counter()

    def __len__(self) -> int:
        return self._num

    def add(self, ticket: Ticket) -> None:
        """Put a request in line."""
        request = ticket.request
        level = self._levels.setdefault(request.priority, _Level())
        due = level.shares.due(request.caller)
        level.shares.charge(request.caller, due, request.tableau.num_steps / request.weight)
        heapq.heappush(level.line, (due, next(self._arrival), ticket))
        self._num += 1
        self._of_caller[request.caller] += 1

    def num_of(self, caller: str) -> int:
        """How many of a caller's wait."""
        return self._of_caller[caller]

    def ahead(self, request: Request) -> Iterator[Ticket]:
        """Those who wait and would start before a request that came now, as far as is known now."""
        for priority, level in self._levels.items():
            if priority > request.priority:
                yield from (ticket for *_, ticket in level.line)
            elif priority == request.priority:
                due = level.shares.due(request.caller)
                yield from (ticket for its, _, ticket in level.line if its <= due)

    def place(self, future: Future[Sample]) -> int | None:
        """How many start before the request of a future; None when it does not wait."""
        for priority, level in self._levels.items():
            for entry in level.line:
                if entry[2].future is future:
                    above = sum(len(other.line) for higher, other in self._levels.items() if higher > priority)
                    return above + sum(other[:2] < entry[:2] for other in level.line)
        return None

    def lengths(self) -> dict[int, int]:
        """How many wait, by priority."""
        return {priority: len(level.line) for priority, level in list(self._levels.items())}

    def drop(self, now_s: float) -> list[Ticket]:
        """Take out the requests that are cancelled or past their deadline, wherever they stand."""
        dropped = []
        for priority, level in list(self._levels.items()):
            line, level.line = level.line, []
            for entry in line:
                if entry[2].is_over(now_s):
                    dropped.append(entry[2])
                else:
                    level.line.append(entry)
            heapq.heapify(level.line)
            if not level.line:
                del self._levels[priority]
        for ticket in dropped:
            self._forget(ticket)
        return dropped

    def take(self, places: int, now_s: float) -> tuple[list[Ticket], list[Ticket]]:
        """Take up to ``places`` requests that still want their sample, in order, and those found over on the way."""
        wanted: list[Ticket] = []
        over: list[Ticket] = []
        while len(wanted) < places and self._levels:
            priority = max(self._levels, key=lambda priority: self._rank(priority, now_s))
            level = self._levels[priority]
            due, _, ticket = heapq.heappop(level.line)
            level.shares.serve(due)
            if not level.line:
                del self._levels[priority]
            self._forget(ticket)
            (over if ticket.is_over(now_s) else wanted).append(ticket)
        return wanted, over

    def _forget(self, ticket: Ticket) -> None:
        caller = ticket.request.caller
        self._num -= 1
        self._of_caller[caller] -= 1
        if not self._of_caller[caller]:
            del self._of_caller[caller]

    def _rank(self, priority: int, now_s: float) -> tuple[float, int]:
        waited_s = now_s - self._levels[priority].line[0][2].submitted_s
        return priority + waited_s / self._ageing_s, priority
