"""`LLM`: prompts in, answers out, in one call. The way to use Quire from a script or a notebook."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any

from quire.config import EngineConfig
from quire.engine.engine import Engine
from quire.engine.garbage import short_collections
from quire.engine.input import Prompt, as_prompts, tokenized
from quire.engine.interrupt import Interrupt, held_interrupt
from quire.engine.progress import GenerationProgress
from quire.engine.tokenizer import Tokenizer
from quire.errors import RequestError
from quire.outputs import BeamSearchOutput, BeamSearchSequence, CompletionOutput, RequestOutput
from quire.sampling_params import BeamSearchParams, RequestOutputKind, SamplingParams, recommended_sampling

ParamsLike = SamplingParams | Sequence[SamplingParams] | None


class LLM:
    """A model that answers lists of prompts. Options are those of `EngineConfig`, by keyword, with vLLM's names.

        llm = LLM("HuggingFaceTB/SmolLM2-135M", dtype="bfloat16")
        for output in llm.generate(["Once", "Twice"], SamplingParams(temperature=0, max_tokens=32)):
            print(output.prompt, output.outputs[0].text)

    Raises ConfigError, ModelError, WeightsError or CapacityError. It may be used as a context manager; `shutdown` frees its
    memory.
    """

    def __init__(self, model: str, *, tokenizer: str | None = None, **options: Any) -> None:
        self._start(EngineConfig.from_options(model, tokenizer=tokenizer, **options))

    @classmethod
    def from_config(cls, config: EngineConfig) -> LLM:
        llm = cls.__new__(cls)
        llm._start(config)
        return llm

    def _start(self, config: EngineConfig) -> None:
        self.engine = Engine(config)
        self._num_requests = 0

    # -- generate ------------------------------------------------------------------------------------------------------
    def generate(
        self,
        prompts: Prompt | Iterable[Prompt] | None = None,
        sampling_params: ParamsLike = None,
        use_tqdm: bool = True,
        *,
        prompt_token_ids: Sequence[int] | Sequence[Sequence[int]] | None = None,
        priority: Sequence[int] | None = None,
    ) -> list[RequestOutput]:
        """Answers all prompts, in their order. `use_tqdm` shows progress on a terminal.

        prompts: one or several of: text, token ids, {"prompt": text}, {"prompt_token_ids": ids} (with "cache_salt").
        sampling_params: for all, or one for each; None is the model's defaults. priority: one for each, lower first.
        Raises RequestError, before anything runs, if one of them is wrong; KeyboardInterrupt at Ctrl-C, after the step that
        runs, when all have been aborted and their blocks are free; EngineDeadError if a step has failed before.
        """
        if (prompts is None) == (prompt_token_ids is None):
            raise RequestError("give either prompts or prompt_token_ids", param="prompts")
        listed = as_prompts(prompts if prompts is not None else prompt_token_ids)  # type: ignore[arg-type]
        params = self._params_for(listed, sampling_params)
        if priority is not None and len(priority) != len(listed):
            raise RequestError(f"{len(priority)} priorities for {len(listed)} prompts", param="priority")
        ids: list[str] = []
        try:
            with held_interrupt() as interrupt:
                self._add(ids, listed, params, [0] * len(listed) if priority is None else priority, interrupt)
                return self._run(ids, use_tqdm, interrupt)
        except BaseException:
            self._abort(ids)
            raise

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]] | Sequence[Sequence[Mapping[str, Any]]],
        sampling_params: ParamsLike = None,
        use_tqdm: bool = True,
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Answers one conversation, or several: lists of {"role": …, "content": …}, through the model's chat template."""
        tokenizer = self.get_tokenizer()
        conversations = [messages] if messages and isinstance(messages[0], Mapping) else messages
        prompts = [
            {
                "prompt_token_ids": tokenizer.encode_chat(
                    conversation,  # type: ignore[arg-type]
                    add_generation_prompt=add_generation_prompt,
                    continue_final_message=continue_final_message,
                    tools=tools,
                    **(chat_template_kwargs or {}),
                )
            }
            for conversation in conversations
        ]
        return self.generate(prompts, sampling_params, use_tqdm)

    def beam_search(
        self,
        prompts: Prompt | Iterable[Prompt],
        params: BeamSearchParams,
        use_tqdm: bool = False,
    ) -> list[BeamSearchOutput]:
        """The likeliest continuations of each prompt, best first: `params.n` of them, or `params.beam_width`. Fewer where
        what the request bans leaves fewer; where it leaves none, one that ends in "error" and scores -inf.

        Raises RequestError, before anything runs, if a prompt is wrong or cannot fit.
        """
        results = self.generate(prompts, params.sampling_params(), use_tqdm)
        return [
            BeamSearchOutput([self._as_beam(result, completion) for completion in result.outputs]) for result in results
        ]

    def _as_beam(self, result: RequestOutput, completion: CompletionOutput) -> BeamSearchSequence:
        prompt = list(result.prompt_token_ids or ())
        before = result.prompt
        if before is None and self.engine.tokenizer is not None:
            before = self.engine.tokenizer.decode(prompt)
        return BeamSearchSequence(
            tokens=prompt + list(completion.token_ids),
            cum_logprob=-math.inf if completion.cumulative_logprob is None else completion.cumulative_logprob,
            score=-math.inf if completion.beam_score is None else completion.beam_score,
            text=None if before is None else before + completion.text,
            logprobs=completion.logprobs,
            finish_reason=completion.finish_reason,
            stop_reason=completion.stop_reason,
        )

    def get_default_sampling_params(self) -> SamplingParams:
        """What the model's generation_config.json recommends, over `SamplingParams()`."""
        return SamplingParams(**recommended_sampling(self.engine.model.generation))

    def get_tokenizer(self) -> Tokenizer:
        if self.engine.tokenizer is None:
            raise RequestError("there is no tokenizer: skip_tokenizer_init left it out")
        return self.engine.tokenizer

    def _params_for(self, prompts: Sequence[Prompt], params: ParamsLike) -> list[SamplingParams]:
        """For each prompt; of the answers only what they are at the end is asked for."""
        if params is None:
            params = self.get_default_sampling_params()
        if isinstance(params, SamplingParams):
            return [replace(params, output_kind=RequestOutputKind.FINAL_ONLY)] * len(prompts)
        listed = list(params)
        if len(listed) != len(prompts):
            raise RequestError(f"{len(listed)} sampling parameters for {len(prompts)} prompts", param="sampling_params")
        return [replace(one, output_kind=RequestOutputKind.FINAL_ONLY) for one in listed]

    def _add(
        self,
        ids: list[str],
        prompts: Sequence[Prompt],
        params: Sequence[SamplingParams],
        priority: Sequence[int],
        interrupt: Interrupt,
    ) -> None:
        """Gives all requests to the engine; `ids` grows by those that it has."""
        tokenizer = self.engine.tokenizer
        for i, prompt in enumerate(prompts if tokenizer is None else tokenized(prompts, tokenizer)):
            request_id = str(self._num_requests)
            try:
                self.engine.add_request(request_id, prompt, params[i], priority=priority[i])
            except RequestError as error:
                if len(prompts) > 1:
                    raise RequestError(f"prompt {i}: {error}", param=error.param) from error
                raise
            self._num_requests += 1
            ids.append(request_id)
            interrupt.check()

    def _run(self, ids: list[str], show: bool, interrupt: Interrupt) -> list[RequestOutput]:
        results: dict[str, RequestOutput] = {}
        with short_collections(), GenerationProgress(len(ids), show) as progress:
            while self.engine.has_unfinished:  # also of a step in flight whose tokens nobody wants any more
                for output in self.engine.step():
                    results[output.request_id] = output
                    progress.advance(output)
                progress.show_usage(self.engine)
                interrupt.check()
        return [results[request_id] for request_id in ids]

    def _abort(self, ids: Iterable[str]) -> None:
        with held_interrupt():
            for request_id in ids:
                self.engine.abort(request_id)
            while self.engine.has_unfinished:
                self.engine.step()

    # -- end -----------------------------------------------------------------------------------------------------------
    def shutdown(self) -> None:
        """Frees the model's and the cache's memory. May be called twice."""
        self.engine.shutdown()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.shutdown()
