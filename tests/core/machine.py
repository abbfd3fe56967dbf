"""A scheduler and a pretend worker under a test's hand. Blocks hold 4 tokens."""

import random
from collections import deque

import numpy as np
from pretend import PretendWorker, first_visible, next_token

from quire.core.accounting import measure
from quire.core.batch import Batch
from quire.core.cache_group import CacheGroup
from quire.core.in_flight import StepTokens
from quire.core.kv_cache import KVCacheManager
from quire.core.preemption import Always, Preemption, PreemptionPolicy
from quire.core.scheduler import Scheduler
from quire.core.sequence import RequestGroup, Sequence
from quire.core.step import SchedulerOutput
from quire.sampling_params import SamplingParams

SIZE = 4
RECOMPUTE, SWAP = Always(Preemption.RECOMPUTE), Always(Preemption.SWAP)


class Machine:
    """A scheduler and a pretend worker; the test says when a step is planned and when its result comes back."""

    def __init__(
        self,
        num_blocks: int = 64,
        *,
        budget: int = 64,
        rows: int = 8,
        max_len: int = 64,
        num_host: int = 0,
        windows: tuple[int | None, ...] = (None,),
        flights: int = 1,
        policy: PreemptionPolicy | None = None,
        cached: bool = True,
        watermark: float = 0.0,
    ) -> None:
        self.groups = tuple(CacheGroup((i,), window, 1, 8, "float32") for i, window in enumerate(windows))
        self.batch = Batch(rows, max_len)
        self.kv = KVCacheManager(
            self.batch, self.groups, num_blocks, SIZE, num_host_blocks=num_host, enable_prefix_caching=cached
        )
        self.scheduler = Scheduler(
            self.batch,
            self.kv,
            max_num_batched_tokens=budget,
            max_model_len=max_len,
            max_steps_in_flight=flights,
            policy=policy,
            watermark=watermark,
        )
        self.worker = PretendWorker(self.groups, num_blocks, num_host, SIZE, rows, max_len)
        self.worker.transfer_rate = 1.0  # a transfer is done by the end of its step
        self.rng = random.Random(0)
        self.flights: deque[SchedulerOutput] = deque()
        self.num_added = 0

    def add(
        self,
        prompt: int | list[int],
        *,
        priority: int = 0,
        eos: tuple[int, ...] = (),
        request_id: str | None = None,
        client: str = "",
        source: Sequence | None = None,
        **params: object,
    ) -> RequestGroup:
        """A request; a prompt given as a length has tokens that no other request has."""
        self.num_added += 1
        tokens = [100 * self.num_added + i for i in range(prompt)] if isinstance(prompt, int) else prompt
        group = RequestGroup(
            request_id=request_id or str(self.num_added),
            prompt_token_ids=np.asarray(tokens, dtype=np.int32),
            params=SamplingParams(**{"max_tokens": 8, **params}),  # type: ignore[arg-type]
            seed=7,
            priority=priority,
            stop_token_ids=eos,
            client=client,
            source=source,
        )
        self.scheduler.add(group)
        return group

    def plan(self) -> SchedulerOutput | None:
        output = self.scheduler.schedule()
        if output is not None:
            self.flights.append(output)
        return output

    def back(self, *, guesses: list[int] | None = None) -> StepTokens:
        """The oldest step's result comes back, with `guesses` for what follows its first sample."""
        result = self.worker.run(self.flights.popleft(), self.rng, 0.0, 0.0)
        if guesses is not None:
            result.draft_token_ids = {0: guesses}
        given = self.scheduler.update(result)
        self.kv.check()
        measure(self.kv).check()
        return given

    def step(self) -> SchedulerOutput | None:
        """Plans a step and takes its result; None if there was nothing to plan."""
        output = self.plan()
        if output is not None:
            self.back()
        return output

    def steps(self, count: int) -> None:
        for _ in range(count):
            assert self.step() is not None

    def finish(self) -> None:
        """Runs everything to its end: nothing is forgotten, nothing leaks, every token is right."""
        for _ in range(2000):
            while self.plan() is not None:
                pass
            if not self.flights:
                break
            self.back()
        assert not self.scheduler.has_unfinished, "requests were forgotten"
        pool, host = self.kv.pool, self.kv.host_pool
        assert pool.num_free == pool.num_blocks and host.num_free == host.num_blocks
        assert self.batch.num_running == 0 and self.scheduler.num_waiting == 0

    def answer(self, group: RequestGroup, branch: int = 0, length: int | None = None) -> list[int]:
        """What the pretend model says of a sequence that is alone in the world."""
        tokens = group.prompt_token_ids.tolist()
        for _ in range(group.max_tokens if length is None else length):
            seen = [np.asarray(tokens[first_visible(g.window, len(tokens) - 1) :]) % 5 for g in self.groups]
            tokens.append(next_token(group.seed, branch, len(tokens), seen))
        return tokens[len(group.prompt_token_ids) :]

    def answers_are_right(self, *groups: RequestGroup) -> bool:
        return all(
            sequence.output_token_ids.tolist() == self.answer(group, sequence.branch)
            for group in groups
            for sequence in group.sequences
        )

    def sharing(self, group: RequestGroup) -> list[list[int]]:
        """The tables of a group's sequences with blocks numbered as they come: equal if the same is shared."""
        numbers: dict[int, int] = {}
        return [
            [numbers.setdefault(block, len(numbers)) for block in self.kv.blocks_of(g, sequence.row)]
            for sequence in group.live
            for g in range(len(self.groups))
        ]
