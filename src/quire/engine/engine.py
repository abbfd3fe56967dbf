"""The engine: requests in, steps, outputs out. This is the page to read first.

    add_request ──> InputProcessor ──> RequestGroup ──> Scheduler (who computes what, in which blocks)
    step        ──> Scheduler.schedule ──> Executor.submit ──> (worker: layers, attention, sampling)
                    Scheduler.update <── StepOutput <──────────┘
                    RequestState (text, stop strings) ──> RequestOutput

It is driven by whoever calls `step` (an `LLM`, the thread of an `AsyncEngine`), one caller at a time. Does not know threads,
sockets, tensors.
"""

from __future__ import annotations

import logging
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

from quire.config import EngineConfig
from quire.core.accounting import SlotUsage, measure
from quire.core.batch import Batch
from quire.core.cache_group import form_groups
from quire.core.fairness import ServiceCounters
from quire.core.in_flight import StepTokens
from quire.core.journal import PreemptionNote
from quire.core.kv_cache import KVCacheManager
from quire.core.memory_plan import MemoryPlan, format_bytes, plan_memory
from quire.core.preemption import Always, CheaperOf, Preemption, PreemptionPolicy, SwapForks
from quire.core.scheduler import Scheduler
from quire.core.sequence import FinishReason, RequestGroup
from quire.core.sequence import Sequence as TokenSequence
from quire.core.step import SchedulerOutput, StepOutput
from quire.engine.explain import Explanation, explain
from quire.engine.input import InputProcessor, Prompt, numbered_seed
from quire.engine.output import BeamState, RequestState, request_state
from quire.engine.tokenizer import Tokenizer
from quire.errors import ConfigError, EngineDeadError, RequestError
from quire.executor.base import Executor, create_executor
from quire.hub import resolve_model
from quire.model_config import ModelConfig, load_model_config
from quire.outputs import RequestOutput
from quire.sampling_params import SamplingParams

logger = logging.getLogger(__name__)

# With a prefix cache, memory is made for so many times what can run at once, if there is as much.
CACHED_GENERATIONS = 4
NUM_EXPLAINED = 512  # finished requests that can still be asked about

# By name, given the bytes of a block.
POLICIES: dict[str, Callable[[int], PreemptionPolicy]] = {
    "auto": CheaperOf,
    "forks": lambda _: SwapForks(),
    "recompute": lambda _: Always(Preemption.RECOMPUTE),
    "swap": lambda _: Always(Preemption.SWAP),
}


class Engine:
    """One model, ready to serve. `clock` gives seconds for outputs' metrics.

    Raises ModelError, WeightsError, ConfigError or CapacityError, each naming what is wrong and what to do.
    """

    def __init__(self, config: EngineConfig, clock: Callable[[], float] = time.monotonic) -> None:
        self.config = config
        self.clock = clock
        directory = resolve_model(config.model, revision=config.revision, config_only=config.load_format == "dummy")
        self.model: ModelConfig = load_model_config(directory, config.hf_overrides)
        self.max_model_len = self.model.resolve_max_model_len(config.max_model_len)
        self.tokenizer_dir = config.tokenizer or directory
        self.tokenizer = None if config.skip_tokenizer_init else Tokenizer.from_dir(self.tokenizer_dir)
        kv_dtype = _kv_dtype(config, self.model)
        self.groups = form_groups(self.model.layer_windows, self.model.num_kv_heads, self.model.head_dim, kv_dtype)
        began_s = clock()
        self.executor: Executor = create_executor(config, self.model, str(directory), self.groups, self.max_model_len)
        self.step_token_budget = config.step_token_budget(self.executor.device_report.device)
        self.memory: MemoryPlan = self._plan_memory()
        self.executor.allocate(self.memory.num_blocks, self.memory.num_host_blocks)
        batch = Batch(config.max_num_seqs, self.max_model_len)
        self.kv = KVCacheManager(
            batch,
            self.groups,
            self.memory.num_blocks,
            config.block_size,
            num_host_blocks=self.memory.num_host_blocks,
            enable_prefix_caching=config.enable_prefix_caching,
            root=(config.model, config.revision, kv_dtype),
        )
        self.scheduler = Scheduler(
            batch,
            self.kv,
            max_num_batched_tokens=self.step_token_budget,
            max_model_len=self.max_model_len,
            max_steps_in_flight=self.executor.max_steps_in_flight,
            policy=POLICIES[config.preemption_mode](self.groups[0].block_bytes(config.block_size)),
            counters=ServiceCounters(config.client_weights),
            step_target_s=None if config.step_target_ms is None else config.step_target_ms / 1e3,
            on_preempt=_log_preemption,
        )
        self._inputs = InputProcessor(config, self.model, self.max_model_len, self.tokenizer)
        self._states: dict[str, RequestState] = {}
        self._flights: deque[tuple[SchedulerOutput, Future[StepOutput]]] = deque()
        self._ended: list[RequestState] = []  # ended outside a step, to be told by the next
        self._failure: BaseException | None = None  # that came out of a step
        self._explained: OrderedDict[str, Explanation] = OrderedDict()  # of requests that have ended, the last ones
        self._log_start(clock() - began_s)

    def _plan_memory(self) -> MemoryPlan:
        report = self.executor.report_memory()
        return plan_memory(
            self.groups,
            block_size=self.config.block_size,
            max_model_len=self.max_model_len,
            max_num_seqs=self.config.max_num_seqs * (CACHED_GENERATIONS if self.config.enable_prefix_caching else 1),
            max_step_tokens=self.step_token_budget,
            budget_bytes=report.budget_bytes,
            weights_bytes=report.weights_bytes,
            activation_bytes=report.activation_bytes,
            swap_bytes=report.swap_bytes,
            num_blocks_override=self.config.num_gpu_blocks_override,
        )

    def _log_start(self, load_s: float) -> None:
        plan, device = self.memory, self.executor.device_report
        fit = plan.max_sequences(self.max_model_len, self.groups, self.step_token_budget)
        logger.info(
            "%s: %.1f M parameters in %s on %s (attention: %s), loaded in %.1f s",
            self.config.model_name,
            device.num_parameters / 1e6,
            device.dtype,
            device.device,
            device.attention_backend,
            load_s,
        )
        logger.info(
            "memory: weights %s, activations up to %s, KV cache %s = %d blocks of %d tokens; swap space %d blocks; "
            "at least %d sequences of %d tokens fit at once",
            format_bytes(plan.weights_bytes),
            format_bytes(plan.activation_bytes),
            format_bytes(plan.kv_bytes),
            plan.num_blocks,
            plan.block_size,
            plan.num_host_blocks,
            min(fit, self.config.max_num_seqs),
            self.max_model_len,
        )

    # -- requests ------------------------------------------------------------------------------------------------------
    def add_request(
        self,
        request_id: str,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        priority: int = 0,
        client: str = "",
    ) -> None:
        """Queues a request of `client`, with whom token time is shared by weight (`client_weights`).

        Raises RequestError if it is malformed or can never run, EngineDeadError if a step has failed; nothing is queued then.
        """
        self._add(request_id, prompt, params or SamplingParams(), priority, client, None)

    def _add(
        self,
        request_id: str,
        prompt: Prompt,
        params: SamplingParams,
        priority: int,
        client: str,
        source: TokenSequence | None,
    ) -> None:
        self._check_alive()
        # also one that was aborted, until the next step has told its end
        if request_id in self._states or any(state.group.request_id == request_id for state in self._ended):
            raise RequestError(f"request id {request_id!r} is in use", param="request_id")
        group, text = self._inputs.process(
            request_id, prompt, params, priority=priority, arrival_s=self.clock(), client=client, source=source
        )
        self.scheduler.add(group)
        self._states[request_id] = request_state(group, text, params, self.tokenizer)

    def fork(
        self,
        request_id: str,
        branch_ids: Sequence[str],
        *,
        append: str | Sequence[int] | None = None,
        params: SamplingParams | Mapping[str, Any] | None = None,
        index: int = 0,
        client: str | None = None,
    ) -> None:
        """Branches of a request that runs: each starts at its last accepted token (of completion `index`), goes on with
        `append` if that is given, and then on its own, under an id of its own. They share its blocks; who writes into a
        shared one copies it. A branch's prompt is all that the parent had until then.

        params: None is the parent's, with n = 1 and the tokens that it has left; a mapping changes some of those. Where a seed
        is given or inherited, each branch draws by a seed made of it and its number. client: refused unless the parent is
        that client's.
        Raises RequestError, with no branch made, if there is no such request, or one of the branches can never run.
        """
        state = self._states.get(request_id)
        if state is None or client not in (None, state.group.client):
            raise RequestError(f"no request {request_id!r} is running", param="request_id")
        group = state.group
        if group.beam is not None:
            raise RequestError("a beam search cannot be forked: it forks itself", param="request_id")
        source = next((sequence for sequence in group.live if sequence.branch == index), None)
        if source is None:
            raise RequestError(f"request {request_id!r} has no completion {index} that runs", param="index")
        if not branch_ids:
            raise RequestError("n must be at least 1", param="n")
        token_ids = source.token_ids.tolist() + self._inputs.read_appended(append)
        if not isinstance(params, SamplingParams):
            left = max(group.max_tokens - source.num_output_tokens, 1)
            own = {"n": 1, "best_of": None, "max_tokens": left, "min_tokens": 0, "prompt_logprobs": None}
            own["truncate_prompt_tokens"] = None  # the parent's prompt has been cut already
            params = replace(group.params, **{**own, **(params or {})})
        made: list[str] = []
        try:
            for branch_id in branch_ids:
                group.num_own_forks += 1
                seed = numbered_seed(group.seed if params.seed is None else params.seed, group.num_own_forks)
                prompt = {"prompt_token_ids": token_ids, "cache_salt": group.cache_salt}
                self._add(branch_id, prompt, replace(params, seed=seed), group.priority, group.client, source)
                made.append(branch_id)
        except RequestError:
            for branch_id in made:
                self.abort(branch_id, tell=False)  # to who asked, there has been none
            raise

    def abort(self, request_id: str, *, tell: bool = True) -> bool:
        """Ends a request; its last output says "abort", without `tell` there is none. False if it isn't there (it may just
        have finished), or a step has failed: that has ended all."""
        if self._failure is not None:
            return False
        state = self._states.get(request_id)
        if not tell:
            self._ended = [ended for ended in self._ended if ended.group.request_id != request_id]
        if state is None:
            return False
        now_s = self.clock()
        live = state.group.live
        self.scheduler.abort(request_id)
        for sequence in live:
            state.finish(sequence, now_s)
        self._forget(state)
        if tell:
            self._ended.append(state)
        return True

    @property
    def has_unfinished(self) -> bool:
        """Whether there is something to step for; not once a step has failed."""
        return self._failure is None and bool(self._states or self._ended or self._flights)

    # -- steps -----------------------------------------------------------------------------------------------------------
    def step(self) -> list[RequestOutput]:
        """Plans as many steps ahead as it may, waits for the oldest, and gives what requests are to be told of it.

        What is raised out of it is the engine's end, since what the scheduler planned is half done then: EngineDeadError from
        there on.
        """
        self._check_alive()
        try:
            return self._step()
        except BaseException as error:
            self._failure = error
            raise

    def _check_alive(self) -> None:
        if (error := self._failure) is not None:
            what = f"{type(error).__name__}: {error}".removesuffix(": ")
            raise EngineDeadError(f"a step failed ({what}), and the engine with it: make a new one") from error

    def _step(self) -> list[RequestOutput]:
        began_s = self.clock()
        while (planned := self.scheduler.schedule()) is not None:
            self._note_admitted()
            self._flights.append((planned, self.executor.submit(planned)))
        touched, self._ended = self._ended, []
        if not self._flights:
            return self._told(touched)
        _, future = self._flights.popleft()
        result = future.result()
        touched += self._process(self.scheduler.update(result), result)
        outputs = self._told(touched)
        self._note_host_time(self.clock() - began_s - result.elapsed_s)
        return outputs

    @staticmethod
    def _told(touched: list[RequestState]) -> list[RequestOutput]:
        return [output for state in touched if (output := state.take_output()) is not None]

    def _note_host_time(self, seconds: float) -> None:
        """What a step takes beside the worker's part leaves so much less of the step target; where steps overlap, nothing."""
        target_s = self.scheduler.step_target_s
        if self.config.step_target_ms is not None and target_s is not None and self.executor.max_steps_in_flight == 1:
            goal_s = self.config.step_target_ms / 1e3
            self.scheduler.step_target_s = max(0.9 * target_s + 0.1 * (goal_s - max(seconds, 0.0)), goal_s / 4)

    def _note_admitted(self) -> None:
        for group in self.scheduler.admitted:
            self._states[group.request_id].metrics.first_scheduled_time = self.clock()
        self.scheduler.admitted.clear()

    def _process(self, given: StepTokens, result: StepOutput) -> list[RequestState]:
        """Hands tokens to their requests; returns those whose callers may be told something new."""
        now_s = self.clock()
        states, logprobs = self._states, result.logprobs
        touched: dict[str, RequestState] = {}
        ended: dict[str, RequestState] = {}  # of which a sequence has: the request may have with it
        for sequence, entry, first_position in given.prompt_entries:
            if state := states.get(sequence.group.request_id):
                state.take_prompt_logprobs(first_position, result.prompt_logprobs[entry])
        for group in given.beam_groups:
            if isinstance(beams := states.get(group.request_id), BeamState):
                beams.advance(now_s)
                touched[group.request_id] = beams
        for sequence, token_id, sample in zip(given.sequences, given.token_ids, given.samples):
            request_id = sequence.group.request_id
            state = states[request_id]
            if not state.is_final_only:
                touched[request_id] = state
            found = logprobs.get(sample) if logprobs else None
            if state.append(sequence, token_id, found, now_s) is not None:
                self._stop(state, sequence, now_s)
                ended[request_id] = state
        for sequence in given.finished:
            request_id = sequence.group.request_id
            state = ended[request_id] = states[request_id]
            state.finish(sequence, now_s)
            if sequence.error is not None:
                logger.warning("request %s failed: %s", request_id, sequence.error)
        for state in ended.values():
            if state.group.is_finished:
                self._forget(state)
        return list((touched | ended).values())

    def _stop(self, state: RequestState, sequence: TokenSequence, now_s: float) -> None:
        """A stop string is there: the sequence ends here, whatever steps in flight add to it."""
        if not sequence.is_finished:
            self.scheduler.finish(sequence, FinishReason.STOP)
        state.finish(sequence, now_s)

    def _forget(self, state: RequestState) -> None:
        request_id = state.group.request_id
        del self._states[request_id]
        self._explained.pop(request_id, None)
        self._explained[request_id] = explain(state.group, state.metrics, self.scheduler.num_steps)
        if len(self._explained) > NUM_EXPLAINED:
            self._explained.popitem(last=False)

    # -- what goes on inside -----------------------------------------------------------------------------------------------
    def slot_usage(self) -> SlotUsage:
        """Where every slot of KV memory is, now."""
        return measure(self.kv)

    def explain(self, request_id: str) -> Explanation | None:
        """Why a request took its time (see `explain.explain`): one that is here, or one of the last that were. None for any
        other."""
        state = self._states.get(request_id)
        if state is None:
            return self._explained.get(request_id)
        return explain(state.group, state.metrics, self.scheduler.num_steps)

    def get_group(self, request_id: str) -> RequestGroup | None:
        return self.scheduler.get(request_id)

    def shutdown(self) -> None:
        """Aborts what is left and frees the device. May be called twice."""
        for request_id in list(self._states):
            self.abort(request_id)
        self.executor.shutdown()
        self._flights.clear()


def _log_preemption(group: RequestGroup, note: PreemptionNote) -> None:
    logger.info("request %s was preempted (%s): %s", group.request_id, note.cause.value, note.explanation)


def _kv_dtype(config: EngineConfig, model: ModelConfig) -> str:
    for dtype in (config.kv_cache_dtype, config.dtype, model.dtype or "float32"):
        if dtype != "auto":
            return dtype
    raise ConfigError("no dtype")  # not reached: the model's is never "auto"
