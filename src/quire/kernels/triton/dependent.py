"""Programmatic dependent launch: a kernel starts while the one before still runs, and waits for its results when it needs them.

    without     | kernel 1       | gap | kernel 2: load weights, compute   |
    with        | kernel 1       |
                       | kernel 2: load weights | wait | compute           |

Rules that every kernel with PDL follows, and on which those after it rely:

1. Before `wait` it reads nothing but constants (weights, and what was copied to the device before the step's first kernel),
   and it writes nothing. `wait` returns when the kernel before has ended and what it wrote can be seen. It may ask for memory
   to be brought into L2, whatever is being written there. (A copy between two kernels, as an eager step has before its first
   attention, is waited for before the second is launched.)
2. Each of its programs waits, at its start: so when it has ended, everything before it has ended too.
3. `release` comes first of all: the next kernel's programs may start once all of this one's have; they take only what
   room is left. With rule 1 this is safe for any next kernel, and any launched without PDL waits by itself.

Captured in a CUDA graph, such launches become programmatic edges. Needs compute capability 9.0; never used by the interpreter.
"""

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl


@triton.jit
def wait():
    tl.extra.cuda.gdc_wait()


@triton.jit
def release():
    tl.extra.cuda.gdc_launch_dependents()


def options(device: torch.device) -> dict[str, Any]:
    """For a launch on this device of a kernel that has the parameter PDL."""
    return {"PDL": True, "launch_pdl": True} if device.type == "cuda" and _supported(device.index) else {"PDL": False}


@cache
def _supported(index: int | None) -> bool:
    return torch.cuda.get_device_capability(index) >= (9, 0)
