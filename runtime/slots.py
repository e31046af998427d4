"""Slots: the places of the latent pool, and everything a running row carries.

Running rows are the first ``len(slots)`` rows of every array, without gaps: rows that leave are replaced
by the last ones. So each step works on plain prefixes, ``slots.x[:n]``, and allocates nothing.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .devices import Cpu, Device
from .request import Paused, Ticket


class Slots:
    """Room for ``capacity`` running rows of one student, in front of its network's input.

    Args:
        capacity: rows that may run together.
        network_input: ``[at least capacity, elements]``, the network's ``x``; its first rows go with the slots.
        history: predictions that a table row may read.
        device: where ``network_input`` lives, and what is as large; the CPU when left out.
    """

    def __init__(self, capacity: int, network_input: NDArray[Any], history: int, device: Device | None = None) -> None:
        elements = network_input.shape[1]
        self.capacity = capacity
        self.tickets: list[Ticket] = []
        self.network_input = network_input
        self._device = device or Cpu()
        self.x = self._device.zeros((capacity, elements), np.float32)
        self.history = self._device.zeros((capacity, history, elements), np.float32)
        self.table_row = np.zeros(capacity, np.int32)  # the table row that comes next
        self.stop = np.zeros(capacity, np.int32)  # the first one that is not the row's any more
        self.seed = np.zeros(capacity, np.uint64)
        self.guidance = np.zeros(capacity, np.float32)
        self.label = np.zeros(capacity, np.int64)

    def __len__(self) -> int:
        return len(self.tickets)

    def add(self, ticket: Ticket, rows: range, label: int, guidance: float) -> None:
        """Give a request the next place; ``rows`` are its table rows. One that was paused goes on where it stood."""
        i = len(self.tickets)
        self.tickets.append(ticket)
        self.table_row[i], self.stop[i] = rows.start, rows.stop
        if ticket.paused is not None:
            self.x[i], self.network_input[i] = ticket.paused.x, ticket.paused.network_input
            self.history[i, : len(ticket.paused.history)] = ticket.paused.history
            self.table_row[i] = rows.stop - ticket.paused.left
            ticket.paused = None
        self.seed[i], self.label[i], self.guidance[i] = ticket.request.seed, label, guidance

    def left(self, i: int) -> int:
        """Table rows that place ``i`` has to go, the one that comes next included."""
        return int(self.stop[i]) - int(self.table_row[i])

    @property
    def finished(self) -> list[int]:
        """Places whose rows have none to go."""
        rows = zip(self.table_row[: len(self)].tolist(), self.stop[: len(self)].tolist(), strict=True)
        return [i for i, (row, stop) in enumerate(rows) if row == stop]

    def pause(self, i: int) -> Ticket:
        """Free place ``i``; its request takes along what it needs to go on in any other one."""
        ticket = self.tickets[i]
        x, network_input, history = (array[i].copy() for array in (self.x, self.network_input, self.history))
        ticket.paused = Paused(x, network_input, history, self.left(i))
        self.remove([i])
        return ticket

    def remove(self, places: Sequence[int]) -> None:
        """Free places; rows from the end move there."""
        rows = len(self.tickets) - len(places)
        gaps = [i for i in places if i < rows]
        if gaps:
            left = set(places)
            last = [i for i in range(rows, len(self.tickets)) if i not in left]
            for i, j in zip(gaps, last, strict=True):
                self.tickets[i] = self.tickets[j]
            free, moving = np.array(gaps), np.array(last)  # once: numpy would make them of lists for each array
            for array in (self.x, self.network_input, self.history, self.table_row, self.stop):
                array[free] = array[moving]
            for array in (self.seed, self.guidance, self.label):
                array[free] = array[moving]
        del self.tickets[rows:]

    def swap(self, i: int, j: int) -> None:
        """Let two rows change places."""
        self.tickets[i], self.tickets[j] = self.tickets[j], self.tickets[i]
        for array in (self.x, self.network_input, self.history):
            row = array[i].copy()
            array[i] = array[j]
            array[j] = row
        for array in (self.table_row, self.stop, self.seed, self.guidance, self.label):
            array[[i, j]] = array[[j, i]]

    def deepen(self, history: int) -> None:
        """Make room for tables that read further back."""
        missing = history - self.history.shape[1]
        if missing > 0:
            rows, places, elements = self.history.shape
            deeper = self._device.zeros((rows, history, elements), np.float32)
            deeper[:, :places] = self.history
            self.history = deeper
