"""Whose turn is it? Waiting groups, in the order of a virtual token counter for each client.

A client's counter is the service that it was given: tokens read and written, written ones dearer, divided by its weight. Among
those who wait, the lowest priority number goes first; within a priority the client with the least counter; within a client
the earliest arrival. A client that begins to wait is lifted to the least counter of those who wait already, so that nobody
saves up the time in which he asked for nothing (Sheng et al., Fairness in Serving Large Language Models, OSDI 2024,
algorithm 2). While two clients wait all the time, their counters stay within max(w_in L, w_out M) of each other, and what they
are given within twice that: L is the longest prompt, M the tokens that run at once.

    alice  counter 900  waits: #7 #9      #8 is first, then #10; a third request of bob's would be next only if those two
    bob    counter 100  waits: #8 #10     had cost him less than 800: else it is alice's turn, with #7

Whom a client displaces that finds no room is `victims.over_its_share`. Does not know blocks, rows, steps or clocks, nor what a
token cost the machine. Whoever schedules reports tokens as he hands them out, and within one step before he asks for the next
group.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from quire.core.sequence import RequestGroup

NOBODY = np.iinfo(np.int64).max  # priority of a client that does not wait
REBASE_AT = 2.0**32  # counters this large are moved down: differences of a millionth of a token stay exact


class ServiceCounters:
    """The clients with live requests, each under a small number that a row can carry, and what they were given.

    A number is good from a client's first live request to the end of its last. After that the counter is remembered under the
    client's name, for the `max_idle` clients that left last: who comes back at once finds his debt again.
    """

    def __init__(
        self,
        weights: Mapping[str, float] | None = None,
        *,
        input_weight: float = 1.0,
        output_weight: float = 2.0,
        max_idle: int = 1024,
    ) -> None:
        self.weights = dict(weights or {})
        assert all(math.isfinite(w) and w > 0 for w in (*self.weights.values(), input_weight, output_weight))
        self.input_weight = input_weight
        self.output_weight = output_weight
        self.max_idle = max_idle
        self.counters = np.zeros(16)  # by client number
        self._per_weight = np.ones(16)  # 1 / weight
        self._num_live: list[int] = []
        self._numbers: dict[str, int] = {}
        self._free: list[int] = []
        self._idle: dict[str, float] = {}  # the longest idle first
        self._zero = 0.0  # where strangers begin

    @property
    def num_clients(self) -> int:
        """With live requests."""
        return len(self._numbers)

    @property
    def num_idle(self) -> int:
        return len(self._idle)

    def weight(self, client: str) -> float:
        return self.weights.get(client, 1.0)

    def number_of(self, client: str) -> int:
        """Raises KeyError for a client without live requests."""
        return self._numbers[client]

    def enter(self, client: str) -> int:
        """The client has one more live request. Returns its number."""
        number = self._numbers.get(client)
        if number is None:
            number = self._free.pop() if self._free else self._grow()
            self._numbers[client] = number
            self.counters[number] = self._idle.pop(client, self._zero)
            self._per_weight[number] = 1.0 / self.weight(client)
        self._num_live[number] += 1
        return number

    def leave(self, client: str) -> None:
        """One of the client's requests has ended."""
        number = self._numbers[client]
        self._num_live[number] -= 1
        if self._num_live[number]:
            return
        del self._numbers[client]
        self._free.append(number)
        self._idle[client] = float(self.counters[number])
        if len(self._idle) > self.max_idle:
            del self._idle[next(iter(self._idle))]

    def _grow(self) -> int:
        number = len(self._num_live)
        self._num_live.append(0)
        if number == len(self.counters):
            self.counters = np.concatenate([self.counters, np.zeros(number)])
            self._per_weight = np.concatenate([self._per_weight, np.ones(number)])
        return number

    def charge(self, number: int, num_prefill_tokens: int = 0, num_decode_tokens: int = 0) -> None:
        cost = self.input_weight * num_prefill_tokens + self.output_weight * num_decode_tokens
        self.counters[number] += cost * self._per_weight[number]

    def charge_rows(self, numbers: np.ndarray, num_tokens: np.ndarray, is_decoding: np.ndarray) -> None:
        """`num_tokens` [R] for clients `numbers` [R], which may repeat; `is_decoding` [R] bool: they are written, not read."""
        if not len(numbers):
            return
        cost = num_tokens * np.where(is_decoding, self.output_weight, self.input_weight)
        given = np.bincount(numbers, cost)
        self.counters[: len(given)] += given * self._per_weight[: len(given)]

    def counter(self, client: str) -> float:
        """Where a client stands, or would begin."""
        number = self._numbers.get(client)
        return self._idle.get(client, self._zero) if number is None else float(self.counters[number])

    def rebase(self, floor: float) -> None:
        """Takes `floor` from all counters: only differences count."""
        self.counters -= floor
        self._zero -= floor
        self._idle = {client: counter - floor for client, counter in self._idle.items()}


class FairQueue:
    """The groups that wait, new or preempted. `first` and `pop` take O(clients), in arrays; `push` O(log groups of a client).

    A group's client has to be entered in `counters` before, and stays so until the group's end.
    """

    def __init__(self, counters: ServiceCounters | None = None) -> None:
        self.counters = ServiceCounters() if counters is None else counters
        self._queues: dict[int, list[tuple[int, int, RequestGroup]]] = {}  # client number -> heap, its top not ended
        self._num_ended: dict[int, int] = {}  # in those heaps, below the top
        self._heads = np.full(16, NOBODY, dtype=np.int64)  # client number -> priority of the top
        self._popped_at: dict[int, int] = {}  # clients that wait: when one of its groups was last taken, by count
        self._num_popped = 0
        self._last_client = ""  # of the group that was popped last
        self._floor = 0.0  # the largest counter that a group was popped at
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[RequestGroup]:
        """All in the order in which they would be served if no counter changed. For tests: it sorts."""
        entries = [
            (priority, float(self.counters.counters[number]), self._popped_at.get(number, 0), arrival, group)
            for number, queue in self._queues.items()
            for priority, arrival, group in queue
            if not group.is_finished
        ]
        return iter(entry[-1] for entry in sorted(entries, key=lambda entry: entry[:-1]))

    def push(self, group: RequestGroup) -> None:
        number = self.counters.number_of(group.client)
        if number >= len(self._heads):
            more = np.full(max(number + 1, 2 * len(self._heads)) - len(self._heads), NOBODY, dtype=np.int64)
            self._heads = np.concatenate([self._heads, more])
        if number not in self._queues:
            self._lift(number, group.priority)
            self._queues[number] = []
        heapq.heappush(self._queues[number], (*group.order, group))
        self._heads[number] = self._queues[number][0][0]
        self._length += 1

    def _lift(self, number: int, priority: int) -> None:
        """To the least counter of those it now competes with: who waits at its priority or above. If nobody does, to that of
        the client that was served last."""
        counters = self.counters
        rivals = np.flatnonzero(self._heads <= priority)
        if len(rivals):
            floor = float(counters.counters[rivals].min())
        else:
            floor = max(self._floor, counters.counter(self._last_client))
        counters.counters[number] = max(float(counters.counters[number]), floor)
        if floor > REBASE_AT:
            counters.rebase(floor)
            self._floor -= floor

    def first(self) -> RequestGroup | None:
        """Who is next. Clients with equal counters take turns."""
        if not self._length:
            return None
        heads = self._heads
        best = np.flatnonzero(heads == heads.min())
        if len(best) > 1:
            counters = self.counters.counters[best]
            best = best[counters == counters.min()]
        numbers = best.tolist()
        if len(numbers) > 1:
            numbers.sort(key=lambda number: (self._popped_at.get(number, 0), self._queues[number][0][1]))
        return self._queues[numbers[0]][0][-1]

    def pop(self, group: RequestGroup) -> None:
        """Takes a waiting group out, to be served: the first, as a rule."""
        number = self.counters.number_of(group.client)
        queue = self._queues[number]
        if queue[0][-1] is group:
            heapq.heappop(queue)
        else:
            queue.remove((*group.order, group))
            heapq.heapify(queue)
        self._length -= 1
        self._num_popped += 1
        self._popped_at[number] = self._num_popped
        self._last_client = group.client
        self._floor = max(self._floor, float(self.counters.counters[number]))
        self._tidy(number)

    def note_finished(self, group: RequestGroup) -> None:
        """A group that waits here has ended. To be told before its client leaves."""
        assert group.is_finished
        number = self.counters.number_of(group.client)
        self._length -= 1
        self._num_ended[number] = self._num_ended.get(number, 0) + 1
        self._tidy(number)

    def _tidy(self, number: int) -> None:
        """The top of a client's heap has not ended; what has is no more than half of it."""
        queue, ended = self._queues[number], self._num_ended.get(number, 0)
        if ended > len(queue) // 2:
            queue[:] = [entry for entry in queue if not entry[-1].is_finished]
            heapq.heapify(queue)
            ended = 0
        while queue and queue[0][-1].is_finished:
            heapq.heappop(queue)
            ended -= 1
        self._num_ended[number] = ended
        if not queue:
            del self._queues[number], self._num_ended[number]
            self._popped_at.pop(number, None)
        self._heads[number] = queue[0][0] if queue else NOBODY
