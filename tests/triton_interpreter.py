"""Import before triton: where there is no GPU, Triton's kernels then run in its interpreter. Skips where Triton is absent."""

import os

import pytest
import torch

HAS_CUDA = torch.cuda.is_available()
os.environ.setdefault("TRITON_INTERPRET", "0" if HAS_CUDA else "1")  # read when a kernel is defined, Triton's own too

pytest.importorskip("triton")
import triton.runtime.interpreter as interpreter  # noqa: E402

_patch = interpreter._patch_lang_tensor


def _patch_lang_tensor(tensor, scope):
    """Triton 3.6 keeps scalars as arrays of one element, which NumPy 2.4 no longer takes for numbers."""
    _patch(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


interpreter._patch_lang_tensor = _patch_lang_tensor
