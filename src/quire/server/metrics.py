"""What /metrics tells: vLLM's names under `quire:`, and where every slot of KV memory is.

Counts come from the engine's process with its reports; distributions are kept here, of finished requests. Each server has a
registry of its own. Does not know HTTP.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from quire.core.accounting import SlotUsage
from quire.core.preemption import Cause, Preemption, Reason
from quire.engine.client import EngineClient, Health
from quire.outputs import RequestMetrics

SHORT_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0)
LONG_S = (
    0.01,
    0.05,
    0.1,
    0.25,
    0.5,
    1.0,
    2.5,
    5.0,
    10.0,
    15.0,
    20.0,
    30.0,
    40.0,
    50.0,
    60.0,
    120.0,
    240.0,
    480.0,
    960.0,
)
FIRST_TOKEN_S = (
    0.001,
    0.005,
    0.01,
    0.02,
    0.04,
    0.06,
    0.08,
    0.1,
    0.25,
    0.5,
    0.75,
    1.0,
    2.5,
    5.0,
    7.5,
    10.0,
    20.0,
    40.0,
    80.0,
)
MAX_OWNERS = 64  # names of keys that have metrics of their own; further ones share "others"
TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000)


# Those that can be, so that their counters begin at 0.
_PREEMPTIONS = [
    (way.value, cause.value, reason.value)
    for cause in (Cause.OUT_OF_BLOCKS, Cause.FAIRNESS)
    for way, reason in (
        (Preemption.SWAP, Reason.SWAP_CHEAPER),
        (Preemption.SWAP, Reason.POLICY),
        (Preemption.RECOMPUTE, Reason.RECOMPUTE_CHEAPER),
        (Preemption.RECOMPUTE, Reason.POLICY),
        (Preemption.RECOMPUTE, Reason.SWAP_SPACE_FULL),
        (Preemption.RECOMPUTE, Reason.GROUP_NOT_WHOLE),
    )
]


class Distribution:
    """A histogram whose observations may count several times. `bounds` are upper ones, rising."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        self.counts[bisect_left(self.bounds, value)] += times
        self.sum += value * times

    def buckets(self) -> list[tuple[str, float]]:
        """Cumulative, as Prometheus has them."""
        total, found = 0, []
        for bound, count in zip([*map(float, self.bounds), float("inf")], self.counts):
            total += count
            found.append(("+Inf" if bound == float("inf") else str(bound), float(total)))
        return found


class ServerMetrics(Collector):
    """Everything that one server tells of itself."""

    def __init__(self, client: EngineClient, model_name: str) -> None:
        self._client = client
        self._model_name = model_name
        self._usage: SlotUsage | None = None
        self._prompt_tokens: Counter[str] = Counter()  # by owner
        self._generation_tokens: Counter[str] = Counter()
        self.finished: Counter[str] = Counter()
        self.aborted = 0  # their client went away
        self.errors: Counter[str] = Counter()  # by status
        self.first_token_s = Distribution(FIRST_TOKEN_S)
        self.inter_token_s = Distribution(SHORT_S)
        self.e2e_s = Distribution(LONG_S)
        self.queue_s = Distribution(LONG_S)
        self.prompt_lengths = Distribution(TOKENS)
        self.generation_lengths = Distribution(TOKENS)
        self._registry = CollectorRegistry()
        self._registry.register(self)

    def observe(self, metrics: RequestMetrics, num_prompt: int, output_lengths: Sequence[int], told_gaps: bool) -> None:
        """A request has finished. told_gaps: the gaps between its tokens were observed one by one."""
        self.prompt_lengths.observe(num_prompt)
        for length in output_lengths:
            self.generation_lengths.observe(length)
        start_s, first_s, last_s = metrics.arrival_time, metrics.first_token_time, metrics.last_token_time
        if metrics.time_in_queue is not None:
            self.queue_s.observe(metrics.time_in_queue)
        if metrics.finished_time is not None:
            self.e2e_s.observe(metrics.finished_time - start_s)
        if first_s is None or last_s is None:
            return
        self.first_token_s.observe(first_s - start_s)
        longest = max(output_lengths, default=0)
        if not told_gaps and longest > 1:
            # nobody heard of single tokens: each gap counts as their mean
            self.inter_token_s.observe((last_s - first_s) / (longest - 1), sum(output_lengths) - len(output_lengths))

    def count_prompt(self, owner: str, num_tokens: int) -> None:
        """Of a finished request, by the name of its key."""
        self._prompt_tokens[self._label(owner)] += num_tokens

    def count_generated(self, owner: str, num_tokens: int) -> None:
        self._generation_tokens[self._label(owner)] += num_tokens

    def _label(self, owner: str) -> str:
        is_known = owner in self._generation_tokens or len(self._generation_tokens) < MAX_OWNERS
        return owner if is_known else "others"

    async def render(self) -> bytes:
        """The text of /metrics. Asks the engine where the slots are, at most once a second."""
        self._usage = await self._client.slot_usage()
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        yield from self._engine_gauges()
        yield from self._slots()
        yield from self._counters()
        yield from self._distributions()

    def _engine_gauges(self) -> Iterator[Metric]:
        counts = self._client.counts
        held = counts.num_blocks - counts.num_free_blocks - counts.num_cached_blocks
        gauges = {
            "num_requests_running": ("requests that run", counts.num_running),
            "num_requests_waiting": ("requests that wait for their first or their next turn", counts.num_waiting),
            "num_requests_queued": ("of these, and those on their way to the engine", self._client.num_queued()),
            "num_sequences_running": ("token streams that run; n of a request of n", counts.num_sequences),
            "kv_cache_usage_perc": (
                "share of KV blocks that requests hold; 1 is all",
                held / max(counts.num_blocks, 1),
            ),
            "engine_up": ("1 when the engine takes requests and its steps come back", self._client.health is Health.OK),
        }
        for name, (text, value) in gauges.items():
            yield self._family(GaugeMetricFamily, name, text, {(): float(value)})
        blocks = {
            ("free",): counts.num_free_blocks,
            ("cached",): counts.num_cached_blocks,
            ("pending",): counts.num_pending_blocks,
            ("held",): held - counts.num_pending_blocks,
        }
        yield self._family(
            GaugeMetricFamily, "kv_blocks", "KV blocks by state, as of the last step", blocks, ("state",)
        )
        yield self._family(GaugeMetricFamily, "kv_blocks_all", "KV blocks in all", {(): counts.num_blocks})

    def _slots(self) -> Iterator[Metric]:
        if (usage := self._usage) is None:
            return
        states = ("filled", "reserved", "waste", "cached", "pending", "free")
        slots = {(state,): float(getattr(usage, state)) for state in states}
        text = "places for one token, by what is in them; the states add up to kv_slots_all"
        yield self._family(GaugeMetricFamily, "kv_slots", text, slots, ("state",))
        yield self._family(GaugeMetricFamily, "kv_slots_all", "places for one token in all", {(): usage.total})
        text = "slots more that it would take if no block were shared"
        yield self._family(GaugeMetricFamily, "kv_slots_shared", text, {(): usage.shared})
        text = "share of the slots of held blocks in which nothing is and nothing is coming"
        waste = usage.waste / usage.allocated if usage.allocated else 0.0
        yield self._family(GaugeMetricFamily, "kv_internal_waste_ratio", text, {(): waste})

    def _counters(self) -> Iterator[Metric]:
        counts = self._client.counts
        preemptions: dict[tuple[str, str, str], float] = dict.fromkeys(_PREEMPTIONS, 0)
        preemptions |= {(way, cause, reason): count for way, cause, reason, count in counts.preemptions}
        counters = {
            "num_preemptions": ("requests that had to make room", sum(preemptions.values())),
            "prefix_cache_queries": ("prompt tokens looked for in the prefix cache", counts.prefix_queries),
            "prefix_cache_hits": ("prompt tokens found there", counts.prefix_hits),
            "prompt_tokens": ("prompt tokens of finished requests", self._prompt_tokens.total()),
            "generation_tokens": ("tokens generated and told", self._generation_tokens.total()),
            "steps": ("steps of the engine", counts.steps),
            "computed_tokens": ("tokens that went through the model, recomputed ones too", counts.tokens),
            "recomputed_tokens": ("tokens that preemptions have thrown away", counts.recomputed_tokens),
            "copied_blocks": ("KV blocks copied because somebody wrote into a shared one", counts.copied_blocks),
            "forked_requests": ("requests that are branches of others, forked while those ran", counts.forked),
            "request_aborts": ("requests whose client went away", self.aborted),
            "engine_restarts": ("times the engine's process was started again", self._client.num_restarts),
        }
        for name, (text, value) in counters.items():
            yield self._family(CounterMetricFamily, name, text, {(): value})
        text, labels = "preemptions by what was done, for whom, and why so", ("kind", "cause", "reason")
        yield self._family(CounterMetricFamily, "preemptions", text, preemptions, labels)
        for name, tokens in (("prompt", self._prompt_tokens), ("generation", self._generation_tokens)):
            by_owner = {(owner,): float(count) for owner, count in tokens.items()}
            text = f"{name}_tokens by the name of the request's key"
            yield self._family(CounterMetricFamily, f"client_{name}_tokens", text, by_owner, ("client",))
        swaps = {("in",): counts.swapped_in_blocks, ("out",): counts.swapped_out_blocks}
        yield self._family(CounterMetricFamily, "swapped_blocks", "KV blocks moved", swaps, ("direction",))
        finished = {(reason,): self.finished[reason] for reason in sorted({"stop", "length", *self.finished})}
        yield self._family(CounterMetricFamily, "request_success", "answers", finished, ("finished_reason",))
        errors = {(status,): count for status, count in sorted(self.errors.items())}
        yield self._family(
            CounterMetricFamily, "request_errors", "HTTP requests answered by an error", errors, ("status",)
        )

    def _distributions(self) -> Iterator[Metric]:
        found = {
            "time_to_first_token_seconds": ("from a request's arrival to its first token", self.first_token_s),
            "inter_token_latency_seconds": ("between two tokens of an answer", self.inter_token_s),
            "e2e_request_latency_seconds": ("from a request's arrival to its end", self.e2e_s),
            "request_queue_time_seconds": ("from a request's arrival to its first step", self.queue_s),
            "request_prompt_tokens": ("tokens of a prompt", self.prompt_lengths),
            "request_generation_tokens": ("tokens of an answer", self.generation_lengths),
        }
        for name, (text, distribution) in found.items():
            family = HistogramMetricFamily(f"quire:{name}", text, labels=("model_name",))
            family.add_metric((self._model_name,), distribution.buckets(), distribution.sum)
            yield family

    def _family(
        self,
        kind: type[GaugeMetricFamily] | type[CounterMetricFamily],
        name: str,
        text: str,
        values: Mapping[Any, float],
        labels: tuple[str, ...] = (),
    ) -> Metric:
        family = kind(f"quire:{name}", text, labels=("model_name", *labels))
        for key, value in values.items():
            family.add_metric((self._model_name, *key), value)
        return family
