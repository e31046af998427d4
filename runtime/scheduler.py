"""The scheduler: which waiting request starts next. It schedules requests; solvers are tables.

Higher priorities first, but time spent in line counts: every ``ageing_s`` of it is worth one level, so nobody starves.
Within a level the caller who was given least goes first, and each caller's own requests in the order they came. That
is start-time fair queueing (Goyal, Vin and Cheng 1996): a request is due when its caller's one before it would be
done, were every caller served at once, and the earliest due starts. With one caller: first come, first served.

When all places are taken, a request of higher priority gets the place of one of lower priority at the next step. That
one goes back to the head of its line with what it needs, and goes on later to the same bits.

The scheduler owns the waiting line and nothing else: running requests belong to the slots. Cancelled and expired
requests are dropped when they come up, or when the line is full. Ending them is the engine's work, after the lock: a
future's callbacks may submit again.
"""

import heapq
import math
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
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
        self.num_steps = 0  # that those in line have before them
        self._of_caller: Counter[str] = Counter()

    def __len__(self) -> int:
        return self._num

    def add(self, ticket: Ticket) -> None:
        """Put a request in line."""
        request = ticket.request
        level = self._level(request.priority)
        due = level.shares.due(request.caller)
        level.shares.charge(request.caller, due, request.tableau.num_steps / request.weight)
        self._put(level, due, ticket)

    def put_back(self, ticket: Ticket) -> None:
        """Put a request that had started at the head of its level; it costs its caller nothing more."""
        self._put(self._level(ticket.request.priority), -math.inf, ticket)

    def _level(self, priority: int) -> _Level:
        level = self._levels.get(priority)
        if level is None:
            level = self._levels[priority] = _Level()
        return level

    def _put(self, level: _Level, due: float, ticket: Ticket) -> None:
        heapq.heappush(level.line, (due, next(self._arrival), ticket))
        self._num += 1
        self.num_steps += ticket.num_steps_left
        self._of_caller[ticket.request.caller] += 1

    def gives_way(self, running: Ticket, priority: int, rank: float, now_s: float) -> bool:
        """Whether one that runs would make room for a request of this priority and rank.

        It does when its priority is lower, unless it has outgrown the difference by ageing or was promised a deadline.
        """
        own = running.request
        is_lower = own.priority < priority and own.deadline_s is None
        return is_lower and running.rank(now_s, self._ageing_s) < rank

    def outranked(self, running: Sequence[Ticket], left: Callable[[int], int], now_s: float) -> int | None:
        """Which of those that run makes room for the one that is next, if any does.

        Of the lowest priority among them the one with the most table rows ``left``, so that least is put off.
        """
        if not self._levels:
            return None
        head = self._levels[self._next(now_s)].line[0][2]
        priority, rank = head.request.priority, head.rank(now_s, self._ageing_s)
        below = [i for i, ticket in enumerate(running) if self.gives_way(ticket, priority, rank, now_s)]
        return min(below, key=lambda i: (running[i].request.priority, -left(i))) if below else None

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

    def places(self) -> dict[Future[Sample], int]:
        """The same of all that wait, at once."""
        levels = [level for _, level in sorted(self._levels.items(), reverse=True)]
        line = (ticket for level in levels for *_, ticket in sorted(level.line, key=lambda entry: entry[:2]))
        return {ticket.future: i for i, ticket in enumerate(line)}

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
            priority = self._next(now_s)
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
        self.num_steps -= ticket.num_steps_left
        self._of_caller[caller] -= 1
        if not self._of_caller[caller]:
            del self._of_caller[caller]

    def _next(self, now_s: float) -> int:
        """The level whose head starts next."""

        def rank(priority: int) -> tuple[float, int]:
            return self._levels[priority].line[0][2].rank(now_s, self._ageing_s), priority

        return max(self._levels, key=rank) if len(self._levels) > 1 else next(iter(self._levels))
