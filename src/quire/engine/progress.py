"""A progress bar for whoever runs an engine over many requests: `LLM` and the batch job. Does not know what they are for."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from quire.outputs import RequestOutput

if TYPE_CHECKING:
    from quire.engine.engine import Engine

REFRESH_S = 0.2


class GenerationProgress:
    """Requests done, tokens a second, share of KV blocks in use, on stderr where that is a terminal. Silent elsewhere.

    total: None if nobody knows yet how many there will be. done: those that an earlier run answered; they count for the
    bar, not for the speed.
    """

    def __init__(self, total: int | None, show: bool, done: int = 0) -> None:
        # stdout belongs to the results
        self._bar = Progress(
            TextColumn("generate"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[speed]}"),
            console=Console(stderr=True),
        )
        self._is_shown = show and self._bar.console.is_terminal
        self._task = self._bar.add_task("generate", total=total, completed=done, speed="")
        self._began_s = time.monotonic()
        self._shown_s = 0.0
        self.num_prompt_tokens = 0
        self.num_output_tokens = 0

    def advance(self, output: RequestOutput | None) -> None:
        """One more is done; None for one that was refused before it ran."""
        if output is not None:
            self.num_prompt_tokens += len(output.prompt_token_ids or ())
            self.num_output_tokens += sum(len(completion.token_ids) for completion in output.outputs)
        self._bar.advance(self._task)

    def show_usage(self, engine: Engine) -> None:
        now = time.monotonic()
        if not self._is_shown or now - self._shown_s < REFRESH_S:
            return
        self._shown_s = now
        elapsed = max(now - self._began_s, 1e-6)
        pool = engine.kv.pool
        self._bar.update(
            self._task,
            speed=f"in {self.num_prompt_tokens / elapsed:,.0f} tok/s, out {self.num_output_tokens / elapsed:,.0f} tok/s, "
            f"KV {pool.num_held / pool.num_blocks:.0%}",
        )

    def __enter__(self) -> GenerationProgress:
        if self._is_shown:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._is_shown:
            self._bar.stop()
