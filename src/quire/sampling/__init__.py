"""From logits to tokens, a batch at a time, on the device. `sampler.py` is the page to start from."""

from quire.sampling.logprobs import PromptLogprobs, RowLogprobs, prompt_logprobs
from quire.sampling.sampler import Sampler, SamplerOutput
from quire.sampling.state import SamplingState

__all__ = ["PromptLogprobs", "RowLogprobs", "Sampler", "SamplerOutput", "SamplingState", "prompt_logprobs"]
