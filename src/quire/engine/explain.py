"""Why a request took its time: the scheduler's journal of it, as data for JSON and as sentences.

Steps are the engine's, times its clock's. Does not know text: token ids stand for themselves.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from quire.core.journal import Journal, PrefixNote
from quire.core.sequence import RequestGroup, Status
from quire.outputs import RequestMetrics

Explanation = dict[str, Any]


def explain(group: RequestGroup, metrics: RequestMetrics, step: int) -> Explanation:
    """What is known of a request after `step` steps: plain data, and under "summary" the same in sentences."""
    journal = group.journal
    found: Explanation = {
        "request_id": group.request_id,
        "status": _status(group),
        "client": group.client,
        "priority": group.priority,
        "num_prompt_tokens": len(group.prompt_token_ids),
        "num_output_tokens": [sequence.num_output_tokens for sequence in group.sequences],
        "times": asdict(metrics),
        "waiting": {
            "steps": journal.num_steps_waited(step),
            "steps_behind_others": journal.num_steps_behind(step),
            "steps_first_in_queue": {shortage.value: count for shortage, count in journal.waited.items()},
        },
        "prefix": _prefix(journal.prefix),
        "preemptions": [
            {
                "step": note.step,
                "cause": note.cause.value,
                "way": note.way.value,
                "reason": note.reason.value,
                "explanation": note.explanation,
                "num_blocks": note.num_blocks,
                "num_lost_tokens": note.num_lost_tokens,
            }
            for note in journal.preemptions
        ],
        "num_copied_blocks": journal.num_copies,
        "num_swapped_blocks": journal.num_swapped_blocks,
        "num_recomputed_tokens": journal.num_recomputed_tokens,
    }
    found["summary"] = list(_sentences(found, journal, metrics))
    return found


def without_others(found: Explanation) -> Explanation:
    """The same for somebody who must not learn what is in others' prompts."""
    prefix = found["prefix"]
    if prefix is None or prefix["first_difference"] is None:
        return found
    told = {**prefix, "first_difference": {**prefix["first_difference"], "cached_tokens": None}}
    before = _prefix_sentence(prefix)
    summary = [_prefix_sentence(told) if sentence == before else sentence for sentence in found["summary"]]
    return {**found, "prefix": told, "summary": summary}


def _status(group: RequestGroup) -> str:
    states = {sequence.status for sequence in group.live}
    for status in (Status.RUNNING, Status.SWAPPED, Status.WAITING):
        if status in states:
            return "preempted" if status is Status.WAITING and group.was_admitted else status.value
    return Status.FINISHED.value


def _prefix(note: PrefixNote | None) -> Explanation | None:
    if note is None:
        return None
    found: Explanation = {
        "num_prompt_tokens": note.num_prompt_tokens,
        "num_cached_tokens": note.num_tokens,
        "blocks": note.blocks,
        "from_fork": note.from_fork,
        "first_difference": None,
    }
    if note.token is not None and note.num_tokens < note.num_prompt_tokens - 1:
        found["first_difference"] = {
            "position": note.num_tokens,
            "token": note.token,
            "cached_tokens": note.cached_tokens,
        }
    return found


def _sentences(found: Mapping[str, Any], journal: Journal, metrics: RequestMetrics) -> list[str]:
    sentences = [f"Request {found['request_id']} is {found['status']}."]
    waiting = found["waiting"]
    lasted = "" if metrics.time_in_queue is None else f" ({1e3 * metrics.time_in_queue:.1f} ms)"
    if not waiting["steps"]:
        sentences.append(f"It did not wait{lasted}.")
    else:
        reasons = [f"{count} for {name}" for name, count in waiting["steps_first_in_queue"].items()]
        if waiting["steps_behind_others"]:
            reasons.append(f"{waiting['steps_behind_others']} behind others")
        sentences.append(f"It waited {waiting['steps']} steps{lasted}: {', '.join(reasons)}.")
    if (prefix := found["prefix"]) is not None:
        sentences.append(_prefix_sentence(prefix))
    for note in journal.preemptions:
        sentences.append(f"At step {note.step} it was preempted ({note.cause.value}): {note.explanation}.")
    costs = [
        f"{found[key]} {what}"
        for key, what in (
            ("num_copied_blocks", "blocks copied on write"),
            ("num_swapped_blocks", "blocks swapped"),
            ("num_recomputed_tokens", "tokens computed again"),
        )
        if found[key]
    ]
    if costs:
        sentences.append(f"It cost {', '.join(costs)}.")
    return sentences


def _prefix_sentence(prefix: Mapping[str, Any]) -> str:
    where = "in the blocks of the request that it was forked from" if prefix["from_fork"] else "in the prefix cache"
    sentence = f"Of {prefix['num_prompt_tokens']} prompt tokens, {prefix['num_cached_tokens']} were found {where}"
    if (difference := prefix["first_difference"]) is None:
        return f"{sentence}: all but the last, which is always computed."
    at, token, others = difference["position"], difference["token"], difference["cached_tokens"]
    if others is None:
        return f"{sentence}; at position {at} (token {token}) it leaves what is cached."
    if not others:
        return f"{sentence}; from position {at} (token {token}) on nothing is cached."
    return f"{sentence}; at position {at} it has token {token} where cached prompts have {', '.join(map(str, others))}."
