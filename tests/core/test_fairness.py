from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass, field

import numpy as np
import pytest

from quire.core.fairness import REBASE_AT, FairQueue, ServiceCounters


@dataclass(eq=False)
class Group:
    """What the queue needs of a RequestGroup."""

    client: str
    arrival: int
    priority: int = 0
    is_finished: bool = False
    prompt: int = 0
    answer: int = 0
    order: tuple[int, int] = field(init=False)

    def __post_init__(self) -> None:
        self.order = (self.priority, self.arrival)


class Desk:
    """A queue whose groups are entered and leave as the scheduler would do it."""

    def __init__(self, **options: object) -> None:
        self.counters = ServiceCounters(**options)  # type: ignore[arg-type]
        self.queue = FairQueue(self.counters)
        self.num_arrived = 0

    def add(self, client: str = "", priority: int = 0, **sizes: int) -> Group:
        group = Group(client, self.num_arrived, priority, **sizes)
        self.num_arrived += 1
        self.counters.enter(client)
        self.queue.push(group)  # type: ignore[arg-type]
        return group

    def take(self) -> Group:
        group = self.queue.first()
        assert group is not None
        self.queue.pop(group)
        return group  # type: ignore[return-value]

    def end(self, group: Group, is_waiting: bool = False) -> None:
        group.is_finished = True
        if is_waiting:
            self.queue.note_finished(group)  # type: ignore[arg-type]
        self.counters.leave(group.client)

    def charge(self, client: str, read: int = 0, written: int = 0) -> None:
        self.counters.charge(self.counters.number_of(client), read, written)


class TestOrder:
    def test_of_one_client_is_arrival(self) -> None:
        desk = Desk()
        groups = [desk.add() for _ in range(5)]
        assert list(desk.queue) == groups
        assert [desk.take() for _ in range(5)] == groups
        assert desk.queue.first() is None and len(desk.queue) == 0

    def test_puts_a_preempted_group_before_later_ones(self) -> None:
        desk = Desk()
        first, second = desk.add(), desk.add()
        assert desk.take() is first
        desk.queue.push(first)
        assert list(desk.queue) == [first, second]

    def test_gives_the_least_served_client_its_turn(self) -> None:
        desk = Desk()
        alice, bob = [desk.add("alice") for _ in range(2)], [desk.add("bob") for _ in range(2)]
        desk.charge("alice", read=900)
        desk.charge("bob", read=100)
        assert list(desk.queue) == [*bob, *alice]
        assert desk.take() is bob[0]
        desk.charge("bob", read=801)
        assert desk.queue.first() is alice[0]

    def test_puts_priority_above_fairness(self) -> None:
        desk = Desk()
        low = desk.add("poor", priority=1)
        high = desk.add("rich", priority=0)
        desk.charge("rich", read=10**6)
        later = desk.add("poor", priority=-1)
        assert list(desk.queue) == [later, high, low]
        assert [desk.take() for _ in range(3)] == [later, high, low]

    def test_lets_clients_with_equal_counters_take_turns(self) -> None:
        desk = Desk()
        for client in "aaabbbccc":
            desk.add(client)
        assert "".join(desk.take().client for _ in range(9)) == "abcabcabc"

    def test_is_what_taking_one_by_one_gives(self) -> None:
        rng = random.Random(1)
        for _ in range(50):
            desk = Desk()
            groups = [desk.add(rng.choice("abcde"), rng.randrange(3)) for _ in range(30)]
            for client in {group.client for group in groups}:
                desk.charge(client, read=rng.randrange(10**6))
            order = list(desk.queue)
            assert [desk.take() for _ in groups] == order

    def test_against_a_model_under_random_use(self) -> None:
        rng = random.Random(2)
        desk, waiting, running = Desk(), [], []
        for _ in range(5000):
            action = rng.random()
            if action < 0.4 or not waiting + running:
                waiting.append(desk.add(rng.choice("abcdefgh"), rng.choice([0, 0, 1])))
            elif action < 0.6 and waiting:
                group = desk.take()
                least = min(
                    waiting, key=lambda g: (g.priority, desk.counters.counter(g.client), 0 if g is group else 1)
                )
                assert least is group
                mine = [g for g in waiting if g.client == group.client]
                assert group is min(mine, key=lambda g: g.order)
                waiting.remove(group)
                running.append(group)
            elif action < 0.7 and running:
                group = running.pop(rng.randrange(len(running)))
                desk.queue.push(group)
                waiting.append(group)
            elif action < 0.8 and waiting:
                desk.end(waiting.pop(rng.randrange(len(waiting))), is_waiting=True)
            elif running:
                group = running.pop(rng.randrange(len(running)))
                desk.charge(group.client, rng.randrange(100), rng.randrange(100))
                desk.end(group)
            assert len(desk.queue) == len(waiting)
            assert desk.counters.num_clients == len({g.client for g in waiting + running})


class TestEndedGroups:
    def test_are_skipped_and_not_counted(self) -> None:
        desk = Desk()
        groups = [desk.add("a") for _ in range(6)]
        desk.end(groups[0], is_waiting=True)
        desk.end(groups[2], is_waiting=True)
        assert len(desk.queue) == 4
        assert list(desk.queue) == [groups[1], groups[3], groups[4], groups[5]]
        assert [desk.take() for _ in range(4)] == [groups[1], groups[3], groups[4], groups[5]]

    def test_take_no_memory(self) -> None:
        desk = Desk()
        desk.add("a")
        for _ in range(1000):
            desk.end(desk.add("a"), is_waiting=True)
        assert sum(map(len, desk.queue._queues.values())) <= 3

    def test_at_the_top_do_not_hide_the_priority_behind_them(self) -> None:
        desk = Desk()
        ended, low, other = desk.add("a", priority=0), desk.add("a", priority=2), desk.add("b", priority=1)
        desk.end(ended, is_waiting=True)
        assert list(desk.queue) == [other, low]
        assert desk.queue.first() is other


class TestLifting:
    def test_idleness_is_not_saved_up(self) -> None:
        desk = Desk()
        desk.add("busy")
        desk.charge("busy", read=10_000)
        desk.add("late")
        assert desk.counters.counter("late") == 10_000

    def test_running_without_waiting_is_not_saved_up_either(self) -> None:
        desk = Desk()
        desk.add("little")
        desk.take()  # one long answer, and no wish that is not met
        desk.add("busy")
        desk.charge("busy", read=10_000)
        desk.add("little")
        assert desk.counters.counter("little") == 10_000

    def test_goes_to_the_last_served_where_nobody_waits(self) -> None:
        desk = Desk()
        desk.add("busy")
        desk.take()
        desk.charge("busy", written=5_000)
        desk.add("late")
        assert desk.counters.counter("late") == 10_000

    def test_does_not_lower(self) -> None:
        desk = Desk()
        desk.add("poor")
        group = desk.add("rich")
        desk.charge("rich", read=500)
        desk.end(group, is_waiting=True)
        desk.add("rich")
        assert desk.counters.counter("rich") == 500

    def test_looks_at_nobody_of_lower_priority(self) -> None:
        desk = Desk()
        desk.add("starved", priority=5)
        desk.add("busy")
        desk.charge("busy", read=10_000)
        desk.add("late")
        assert desk.counters.counter("late") == 10_000
        desk.add("humble", priority=5)
        assert desk.counters.counter("humble") == 0


class TestCounters:
    def test_weigh_written_tokens_twice_and_divide_by_the_weight(self) -> None:
        counters = ServiceCounters({"gold": 4.0})
        numbers = [counters.enter(client) for client in ("plain", "gold")]
        for number in numbers:
            counters.charge(number, num_prefill_tokens=100, num_decode_tokens=50)
        assert [counters.counter(client) for client in ("plain", "gold", "stranger")] == [200, 50, 0]

    def test_of_many_rows_equal_those_charged_one_by_one(self) -> None:
        rng = np.random.default_rng(3)
        weights = {str(i): float(rng.uniform(0.1, 10)) for i in range(40)}
        rows, singly = ServiceCounters(weights), ServiceCounters(weights)
        for i in range(100):
            rows.enter(str(i))
            singly.enter(str(i))
        numbers, tokens = rng.integers(0, 100, 500), rng.integers(1, 100, 500)
        is_decoding = rng.random(500) < 0.5
        rows.charge_rows(numbers, tokens, is_decoding)
        for number, count, decodes in zip(numbers.tolist(), tokens.tolist(), is_decoding.tolist()):
            singly.charge(number, 0 if decodes else count, count if decodes else 0)
        np.testing.assert_allclose(rows.counters, singly.counters)
        rows.charge_rows(numbers[:0], tokens[:0], is_decoding[:0])

    @pytest.mark.parametrize("weight", [0.0, -1.0, float("nan"), float("inf")])
    def test_take_no_weight_that_is_not_positive(self, weight: float) -> None:
        with pytest.raises(AssertionError):
            ServiceCounters({"a": weight})

    def test_are_remembered_for_a_while(self) -> None:
        desk = Desk(max_idle=2)
        for client in "abc":
            group = desk.add(client)
            desk.take()
            desk.charge(client, read=7)
            desk.end(group)
        assert desk.counters.num_idle == 2
        assert desk.counters.counter("a") == 0  # forgotten
        assert desk.counters.counter("c") > 7

    def test_of_a_million_clients_take_bounded_memory(self) -> None:
        desk = Desk()
        for i in range(20_000):  # the same code for each of a million, which take 10 s
            group = desk.add(f"client {i}")
            desk.take()
            desk.charge(group.client, read=100)
            desk.end(group)
        assert desk.counters.num_idle == desk.counters.max_idle
        assert len(desk.counters._num_live) == 1 and desk.counters.num_clients == 0
        assert not desk.queue._queues and not desk.queue._popped_at and not desk.queue._num_ended

    def test_keep_their_differences_however_large_they_get(self) -> None:
        desk = Desk()
        for client in ("a", "b", "b"):
            desk.add(client)
        for client in ("a", "b"):
            desk.charge(client, read=int(3 * REBASE_AT))
        desk.charge("a", read=1)
        desk.add("c")
        assert abs(desk.counters.counter("b")) < 1
        assert desk.counters.counter("a") - desk.counters.counter("b") == 1
        assert desk.counters.counter("c") == desk.counters.counter("b")
        assert desk.counters.counter("stranger") == -3 * REBASE_AT  # is lifted like any other
        desk.add("stranger")
        assert desk.counters.counter("stranger") == desk.counters.counter("b")


class TestService:
    """The theorems of the paper's section 4, in a machine of `room` tokens whose groups are never preempted."""

    @staticmethod
    def simulate(seed: int, weights: dict[str, float], room: int, longest: int, steps: int) -> tuple[float, float]:
        """Clients a and b always have more waiting; c comes and goes. The largest difference of counters of a and b, and of
        what they were given in any interval."""
        rng = random.Random(seed)
        desk = Desk(weights=weights)
        running: deque[Group] = deque()
        done: dict[Group, int] = {}
        most, given, history = 0.0, {"a": 0.0, "b": 0.0, "c": 0.0}, [0.0]

        def give(client: str, read: int, written: int) -> None:
            desk.charge(client, read, written)
            given[client] += (read + 2 * written) / desk.counters.weight(client)

        for _ in range(steps):
            for client in "ab":
                while sum(group.client == client for group in desk.queue) < 3:
                    short = 1 if client == "a" else 4
                    desk.add(client, prompt=rng.randint(1, longest // short), answer=rng.randint(1, 20 * short))
            if rng.random() < 0.05:
                desk.add("c", prompt=rng.randint(1, longest), answer=rng.randint(1, 20))
            while (group := desk.queue.first()) is not None:
                used = sum(g.prompt + g.answer for g in running)
                if used + group.prompt + group.answer > room:
                    break
                desk.take()
                give(group.client, group.prompt, 0)
                running.append(group)
            for group in list(running):
                done[group] = done.get(group, 0) + 1
                give(group.client, 0, 1)
                if done[group] == group.answer:
                    running.remove(group)
                    desk.end(group)
            most = max(most, abs(desk.counters.counter("a") - desk.counters.counter("b")))
            history.append(given["a"] - given["b"])
        return most, max(history) - min(history)

    @pytest.mark.parametrize("seed", range(5))
    def test_of_two_backlogged_clients_is_bounded(self, seed: int) -> None:
        room, longest = 600, 100
        bound = max(1 * longest, 2 * room)
        counters, service = self.simulate(seed, {}, room, longest, 1500)
        assert counters <= bound
        assert service <= 2 * bound

    def test_is_shared_by_weight(self) -> None:
        _, service = self.simulate(7, {"a": 3.0}, 600, 100, 1500)
        assert service <= 2 * 2 * 600
