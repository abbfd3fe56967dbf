"""Numbers about a run from the records of its requests: throughput, latencies, goodput.

Percentiles interpolate linearly between ranks, as NumPy's do. Does not know how requests were sent.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from quire.bench.load import Record
from quire.errors import ConfigError

LATENCIES: Mapping[str, Callable[[Record], float | None]] = {
    "ttft": lambda record: record.ttft_s,
    "tpot": lambda record: record.tpot_s,
    "e2e": lambda record: record.e2e_s,
}


def percentile(values: Sequence[float], percent: float) -> float:
    """Of values in any order, at least one: percentile([1, 2, 3, 4], 50) is 2.5."""
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def parse_goodput(limits: Iterable[str]) -> dict[str, float]:
    """["ttft:500", "e2e:8000"], in milliseconds, to seconds by name. Raises ConfigError."""
    found = {}
    for limit in limits:
        name, _, value = limit.partition(":")
        if name not in LATENCIES or not re.fullmatch(r"\d+(\.\d+)?", value):
            raise ConfigError(f"goodput {limit!r} is not NAME:MILLISECONDS, with a name of {', '.join(LATENCIES)}")
        found[name] = float(value) / 1000
    return found


def is_good(record: Record, limits: Mapping[str, float]) -> bool:
    """Answered, with no latency above its limit. An answer of one token has no time per further token, and keeps any."""
    if record.error is not None:
        return False
    return all((LATENCIES[name](record) or 0.0) <= limit for name, limit in limits.items())


@dataclass(frozen=True)
class Summary:
    """A run in numbers. `limits`: of the goodput, in seconds, empty if nobody asked.

    Throughputs count answered requests only, over the time from the first request's sending to the last one's end.
    """

    records: Sequence[Record]
    duration_s: float
    limits: Mapping[str, float]

    @property
    def answered(self) -> list[Record]:
        return [record for record in self.records if record.error is None]

    @property
    def errors(self) -> Counter[str]:
        """How many requests failed, by what was wrong."""
        return Counter(record.error for record in self.records if record.error is not None)

    @property
    def normalized_s(self) -> float | None:
        """Mean over requests of end-to-end latency / length of the answer (Kwon et al., SOSP 2023, section 6.1)."""
        found = [record.e2e_s / record.num_output for record in self.answered if record.e2e_s and record.num_output]
        return sum(found) / len(found) if found else None

    def latency_rows(self) -> list[dict[str, Any]]:
        """A row for each kind of latency, in milliseconds; None where no request has one."""
        answered = self.answered
        rows = []
        for title, values in (
            ("TTFT", [record.ttft_s for record in answered]),
            ("TPOT", [record.tpot_s for record in answered]),
            ("ITL", [gap for record in answered for gap in record.gaps_s]),
            ("E2E", [record.e2e_s for record in answered]),
        ):
            ms = [value * 1000 for value in values if value is not None]
            row: dict[str, Any] = {"ms": title}
            row["mean"] = sum(ms) / len(ms) if ms else None
            for name, percent in (("median", 50), ("p90", 90), ("p99", 99), ("max", 100)):
                row[name] = percentile(ms, percent) if ms else None
            rows.append(row)
        return rows

    def facts(self) -> dict[str, Any]:
        """Everything else, by name, in the order in which it is to be read."""
        answered, seconds = self.answered, max(self.duration_s, 1e-9)
        num_prompt = sum(record.num_prompt for record in answered)
        num_output = sum(record.num_output for record in answered)
        facts: dict[str, Any] = {
            "requests_ok": len(answered),
            "requests_failed": len(self.records) - len(answered),
            "duration_s": self.duration_s,
            "requests_per_s": len(answered) / seconds,
            "output_tokens_per_s": num_output / seconds,
            "total_tokens_per_s": (num_prompt + num_output) / seconds,
            "prompt_tokens": num_prompt,
            "cached_prompt_tokens": sum(record.num_cached for record in answered),
            "output_tokens": num_output,
            "normalized_latency_ms_per_token": None if self.normalized_s is None else self.normalized_s * 1000,
        }
        if num_short := sum(
            record.num_asked is not None and record.num_output < record.num_asked for record in answered
        ):
            facts["answers_shorter_than_asked"] = num_short
        if self.limits:
            num_good = sum(is_good(record, self.limits) for record in self.records)
            facts["goodput_limits_ms"] = {name: limit * 1000 for name, limit in self.limits.items()}
            facts["goodput_requests_per_s"] = num_good / seconds
            facts["goodput_share"] = num_good / max(len(self.records), 1)
        if self.records:
            facts["client_late_ms_p99"] = percentile([record.late_s * 1000 for record in self.records], 99)
            facts["waited_for_concurrency_ms_mean"] = 1000 * sum(r.waited_s for r in self.records) / len(self.records)
        if self.errors:
            facts["errors"] = dict(self.errors.most_common(10))
        return facts
