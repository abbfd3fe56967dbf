"""The C kernels for CPUs: compiles cpu.c at first use, loads it by ctypes, and checks arguments before C sees them.

Knows compilers, the cache of compiled files, pointers and strides. Does not know models or batches. Meanings, shapes and
dtypes are in `quire.kernels`; the twin of each operation is in `torch_ops`.

The compiled file runs on torch's own pool of OpenMP threads: torch is loaded first and brings libgomp.so.1, which the dynamic
loader then also gives to us (a compiler that uses another OpenMP library gets a second pool). Compiled files are kept in
$QUIRE_CACHE/kernels or ~/.cache/quire/kernels under a name that covers source, compiler, flags and CPU, so that machines may
share a cache and never run each other's instructions.
"""

import ctypes
import hashlib
import os
import platform
import shlex
import stat
import subprocess
import tempfile
from collections.abc import Sequence
from ctypes import c_float, c_int, c_int64, c_void_p
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

_SOURCE = Path(__file__).with_name("cpu.c")
_FLAGS = ("-std=gnu11", "-O3", "-shared", "-fPIC", "-fno-math-errno", "-fno-trapping-math")
# Tried in order. ARM compilers want -mcpu; Apple's has no OpenMP, and one thread is better than none.
_MACHINE_FLAGS = (("-march=native", "-fopenmp"), ("-mcpu=native", "-fopenmp"), ("-mcpu=native",), ())
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_MAX_HEAD_SIZE = 256
_ERRORS = {
    -1: (IndexError, "a slot or a block id lies outside the pool"),
    -2: (ValueError, "query_start_loc, seq_lens and the block tables contradict each other"),
    -3: (MemoryError, "no memory for the scratch space of attention"),
    -4: (IndexError, "a position lies outside cos_sin"),
}

_p, _l, _i, _f = c_void_p, c_int64, c_int, c_float
_SIGNATURES = {
    "quire_rms_norm": (None, [_i, _p, _l, _l, _p, _p, _p, _l, _l, _l, _f, _i]),
    "quire_silu_and_mul": (None, [_i, _p, _l, _p, _l, _l, _i]),
    "quire_rotary": (_i, [_i, _p, _l, _l, _l, _p, _l, _l, _l, _p, _l, _l, _p, _i, _l, _i]),
    "quire_write_kv": (_i, [_i, _p, _l, _l, _p, _l, _l, _i, _p, _l, _l, _l, _l, _l, _p, _i, _l, _i]),
    "quire_copy_blocks": (_i, [_p, _l, _p, _l, _l, _p, _p, _l, _i]),
    "quire_attention": (
        _i,
        [_i, _p, _l, _l, _p, _l, _l, _i, _p, _l, _l, _l, _l, _l, _p, _p, _p, _l, _l, _f, _f, _l, _i, _i],
    ),
}  # fmt: skip


class BuildError(Exception):
    """The C kernels could not be compiled or loaded; the message is one line."""


class CpuKernels:
    """`Kernels` in C. Construct by `CpuKernels.build()`."""

    name = "cpu"

    def __init__(self, library: ctypes.CDLL) -> None:
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
        self._rms_norm = library.quire_rms_norm
        self._silu_and_mul = library.quire_silu_and_mul
        self._rotary = library.quire_rotary
        self._write_kv = library.quire_write_kv
        self._copy_blocks = library.quire_copy_blocks
        self._attention = library.quire_attention

    @classmethod
    def build(cls, extra_flags: Sequence[str] = ()) -> Self:
        """Compiles (unless cached) and loads the library; raises BuildError. `extra_flags`: -DQUIRE_GENERIC, for tests."""
        return cls(_load(tuple(extra_flags)))

    def rms_norm(self, x_TH: Tensor, weight_H: Tensor, eps: float) -> Tensor:
        return self._norm(x_TH, None, weight_H, eps)

    def residual(self, residual_TH: Tensor) -> None:
        """Norms add."""

    def linear(self, x_TH: Tensor, weight_OH: Tensor, bias_O: Tensor | None = None) -> Tensor:
        return torch.nn.functional.linear(x_TH, weight_OH, bias_O)

    def linear_silu_mul(self, x_TH: Tensor, weight_O2H: Tensor, bias_O2: Tensor | None = None) -> Tensor:
        return self.silu_and_mul(self.linear(x_TH, weight_O2H, bias_O2))

    def linear_pieces(self, x_TH: Tensor, weight_OH: Tensor, bias_O: Tensor | None = None) -> Tensor:
        return self.linear(x_TH, weight_OH, bias_O)

    def add_rms_norm(self, x_TH: Tensor, residual_TH: Tensor, weight_H: Tensor, eps: float) -> Tensor:
        if x_TH.dim() == 3:
            x_TH = x_TH.sum(0).to(residual_TH.dtype)
        if residual_TH.shape != x_TH.shape or residual_TH.dtype is not x_TH.dtype or not residual_TH.is_contiguous():
            raise ValueError("residual must be contiguous and of x's shape and dtype")
        return self._norm(x_TH, residual_TH, weight_H, eps)

    def _norm(self, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> Tensor:
        code = _code(x)
        *outer, size = x.shape
        strides = x.stride()
        if weight.dtype is not x.dtype or weight.shape != (size,) or not weight.is_contiguous():
            raise ValueError(f"weight must be a contiguous [{size}] of {x.dtype}, is {_describe(weight)}")
        if len(outer) not in (1, 2) or strides[-1] != 1:
            raise ValueError(f"x must be [T, H] or [T, heads, D] with a contiguous last dimension, is {_describe(x)}")
        out = torch.empty_like(x, memory_format=torch.contiguous_format)  # half the time of torch.empty
        heads, head_stride = (outer[1], strides[1]) if len(outer) == 2 else (1, 0)
        residual_at = None if residual is None else residual.data_ptr()
        self._rms_norm(
            code, x.data_ptr(), strides[0], head_stride, residual_at, weight.data_ptr(), out.data_ptr(),
            outer[0], heads, size, eps, torch.get_num_threads(),
        )  # fmt: skip
        return out

    def rotary_(self, q_TND: Tensor, k_TKD: Tensor, cos_sin_PR: Tensor, positions_T: Tensor) -> None:
        code = _code(q_TND)
        (tokens, q_heads, size), (k_tokens, k_heads, k_size) = q_TND.shape, k_TKD.shape
        q_strides, k_strides = q_TND.stride(), k_TKD.stride()
        max_positions, rotary_size = cos_sin_PR.shape
        if k_TKD.dtype is not q_TND.dtype or k_tokens != tokens or k_size != size or q_strides[2] + k_strides[2] != 2:
            raise ValueError(f"q and k don't match: {_describe(q_TND)}, {_describe(k_TKD)}")
        if (
            cos_sin_PR.dtype is not torch.float32
            or not cos_sin_PR.is_contiguous()
            or rotary_size > size
            or rotary_size % 2
        ):
            raise ValueError(f"cos_sin must be a contiguous fp32 [P, R], R even, <= {size}: {_describe(cos_sin_PR)}")
        status = self._rotary(
            code, q_TND.data_ptr(), q_strides[0], q_strides[1], q_heads, k_TKD.data_ptr(), k_strides[0], k_strides[1],
            k_heads, cos_sin_PR.data_ptr(), max_positions, rotary_size // 2, positions_T.data_ptr(),
            _is_int64(positions_T, tokens), tokens, torch.get_num_threads(),
        )  # fmt: skip
        if status:
            _raise(status)

    def silu_and_mul(self, gate_up_TI2: Tensor) -> Tensor:
        code = _code(gate_up_TI2)
        tokens, size = gate_up_TI2.shape
        strides = gate_up_TI2.stride()
        if size % 2 or strides[1] != 1:
            raise ValueError(f"gate_up must be [T, 2 I] with a contiguous last dimension, is {_describe(gate_up_TI2)}")
        out = gate_up_TI2.new_empty((tokens, size // 2))
        self._silu_and_mul(
            code, gate_up_TI2.data_ptr(), strides[0], out.data_ptr(), tokens, size // 2, torch.get_num_threads()
        )
        return out

    def write_kv(self, k_TKD: Tensor, v_TKD: Tensor, kv_B2KSD: Tensor, slots_T: Tensor) -> None:
        code = _code(k_TKD)
        kv_code, block_stride = _cache(kv_B2KSD)
        num_blocks, _, heads, block_size, size = kv_B2KSD.shape
        shape, k_strides, v_strides = k_TKD.shape, k_TKD.stride(), v_TKD.stride()
        if shape[1:] != (heads, size) or k_strides[2] != 1:
            raise ValueError(f"k must be [T, {heads}, {size}] with a contiguous last dimension, is {_describe(k_TKD)}")
        if v_TKD.shape != shape or v_TKD.dtype is not k_TKD.dtype or v_strides[2] != 1:
            raise ValueError(f"k and v don't match: {_describe(k_TKD)}, {_describe(v_TKD)}")
        status = self._write_kv(
            code, k_TKD.data_ptr(), k_strides[0], k_strides[1], v_TKD.data_ptr(), v_strides[0], v_strides[1],
            kv_code, kv_B2KSD.data_ptr(), block_stride, num_blocks, heads, block_size, size,
            slots_T.data_ptr(), _is_int64(slots_T, shape[0]), shape[0], torch.get_num_threads(),
        )  # fmt: skip
        if status:
            _raise(status)

    def norm_rotary_write(
        self,
        q_TND: Tensor,
        k_TKD: Tensor,
        v_TKD: Tensor,
        kv_B2KSD: Tensor,
        slots_T: Tensor,
        *,
        norm: tuple[Tensor, Tensor, float] | None = None,
        rotary: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        """One after the other: a call costs little here, and the cache between them is the CPU's."""
        k = k_TKD.clone()
        if norm is not None:
            q_weight_D, k_weight_D, eps = norm
            q_TND.copy_(self.rms_norm(q_TND, q_weight_D, eps))
            k = self.rms_norm(k, k_weight_D, eps)
        if rotary is not None:
            self.rotary_(q_TND, k, *rotary)
        self.write_kv(k, v_TKD, kv_B2KSD, slots_T)

    def embed(self, ids_T: Tensor, table_VH: Tensor) -> Tensor:
        return torch.nn.functional.embedding(ids_T, table_VH)

    def copy_blocks(self, kv: Tensor, src_ids: Tensor, dst_ids: Tensor) -> None:
        self.swap_blocks(kv, kv, src_ids, dst_ids)

    def swap_blocks(self, src_pool: Tensor, dst_pool: Tensor, src_ids: Tensor, dst_ids: Tensor) -> None:
        for pool in (src_pool, dst_pool):
            if pool.shape[1:] != src_pool.shape[1:] or pool.dtype is not src_pool.dtype or not pool.is_contiguous():
                raise ValueError("pools must be contiguous and have blocks of the same shape and dtype")
            _code(pool)
        for ids in (src_ids, dst_ids):
            if ids.dtype is not torch.int64 or ids.dim() != 1 or len(ids) != len(src_ids) or not ids.is_contiguous():
                raise ValueError(f"block ids must be contiguous int64 [n], alike for both: {_describe(ids)}")
            _on_cpu(ids)
        status = self._copy_blocks(
            src_pool.data_ptr(), len(src_pool), dst_pool.data_ptr(), len(dst_pool), src_pool[:1].nbytes,
            src_ids.data_ptr(), dst_ids.data_ptr(), len(src_ids), torch.get_num_threads(),
        )  # fmt: skip
        if status:
            _raise(status)

    def attention(
        self,
        q_TND: Tensor,
        kv_B2KSD: Tensor,
        query_start_loc_S1: Tensor,
        seq_lens_S: Tensor,
        block_tables_SB: Tensor,
        *,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
        causal: bool = True,
    ) -> Tensor:
        """Beyond `Kernels.attention`: head sizes are multiples of 8 up to 256.

        A query's result is bitwise the same whatever else is in the batch, however its sequence was cut into chunks and on
        any number of threads (cpu.c says why). bf16 queries over a bf16 cache round probabilities to bf16 where the CPU
        multiplies bf16 natively.
        """
        code, (kv_code, block_stride) = _code(q_TND), _cache(kv_B2KSD)
        (tokens, heads, size), strides = q_TND.shape, q_TND.stride()
        num_blocks, _, kv_heads, block_size, kv_size = kv_B2KSD.shape
        num_seqs, table_width = block_tables_SB.shape
        if size != kv_size or size % 8 or size > _MAX_HEAD_SIZE or heads % kv_heads or strides[2] != 1:
            raise ValueError(
                f"q must be [T, N, D], N a multiple of {kv_heads}, D of 8 up to {_MAX_HEAD_SIZE} and like the cache's: "
                f"{_describe(q_TND)}, {_describe(kv_B2KSD)}"
            )
        for x, count in ((query_start_loc_S1, num_seqs + 1), (seq_lens_S, num_seqs), (block_tables_SB, num_seqs)):
            if x.dtype is not torch.int32 or len(x) != count or not x.is_contiguous() or not x.is_cpu:
                raise ValueError(
                    f"the batch must be contiguous int32 [S + 1], [S] and [S, B] on the CPU: {_describe(x)}"
                )
        o_TND = torch.empty_like(q_TND, memory_format=torch.contiguous_format)
        status = self._attention(
            code, q_TND.data_ptr(), strides[0], strides[1], o_TND.data_ptr(), tokens, heads,
            kv_code, kv_B2KSD.data_ptr(), block_stride, num_blocks, kv_heads, block_size, size,
            query_start_loc_S1.data_ptr(), seq_lens_S.data_ptr(), block_tables_SB.data_ptr(), table_width, num_seqs,
            scale, softcap or 0.0, window or 0, causal, torch.get_num_threads(),
        )  # fmt: skip
        if status:
            _raise(status)
        return o_TND


# ---- checks; they run for every operation of every layer, so each costs a fraction of a microsecond ----


def _code(x: Tensor) -> int:
    code = _DTYPES.get(x.dtype)
    if code is None or not x.is_cpu:
        raise TypeError(f"C kernels take fp32, bf16 or fp16 on the CPU, not {_describe(x)}")
    return code


def _on_cpu(x: Tensor) -> None:
    if not x.is_cpu:
        raise TypeError(f"C kernels take tensors on the CPU, not {_describe(x)}")


def _is_int64(x: Tensor, length: int) -> int:
    if x.dtype not in (torch.int32, torch.int64) or x.shape != (length,) or not x.is_contiguous() or not x.is_cpu:
        raise ValueError(f"indices must be contiguous int32 or int64 [{length}] on the CPU, not {_describe(x)}")
    return x.dtype is torch.int64


def _cache(kv_B2KSD: Tensor) -> tuple[int, int]:
    """dtype code and block stride of one layer's view of a pool, whose blocks must each be contiguous."""
    _, two, heads, block_size, size = kv_B2KSD.shape
    stride, *inner = kv_B2KSD.stride()
    expected = [heads * block_size * size, block_size * size, size, 1]
    if two != 2 or inner != expected or size > _MAX_HEAD_SIZE:
        raise ValueError(
            f"a layer's cache must be a view pool[:, layer] of a contiguous pool, is {_describe(kv_B2KSD)}"
        )
    return _code(kv_B2KSD), stride


def _describe(x: Tensor) -> str:
    return f"{list(x.shape)} {x.dtype} strides {list(x.stride())} on {x.device}"


def _raise(status: int) -> None:
    kind, message = _ERRORS[status]
    raise kind(message)


# ---- compiling ----


def _load(extra_flags: tuple[str, ...]) -> ctypes.CDLL:
    compiler = shlex.split(os.environ.get("CC") or "cc")
    try:
        version = subprocess.run([*compiler, "--version"], capture_output=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise BuildError(f"no C compiler {compiler[0]!r} (install gcc, or set CC): {error}") from error
    key = hashlib.sha256()
    for part in (_SOURCE.read_bytes(), version, repr((compiler, _FLAGS, _MACHINE_FLAGS, extra_flags)).encode(), _cpu()):
        key.update(hashlib.sha256(part).digest())
    name = f"cpu-{key.hexdigest()[:32]}.so"
    directory = _cache_directory()
    if directory is None:  # compile for this process alone; a loaded file may be deleted
        with tempfile.TemporaryDirectory(prefix="quire-") as temporary:
            return _open(_compile(compiler, extra_flags, Path(temporary) / name))
    path = directory / name
    return _open(path if path.exists() else _compile(compiler, extra_flags, path))


def _open(path: Path) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise BuildError(f"{path} does not load: {error}") from error


def _compile(compiler: list[str], extra_flags: tuple[str, ...], path: Path) -> Path:
    """Compiles to a file of its own and renames it: other processes see the whole file or none."""
    handle, temporary = tempfile.mkstemp(suffix=".so", dir=path.parent)
    os.close(handle)
    message = ""
    try:
        for machine_flags in _MACHINE_FLAGS:
            command = [*compiler, *_FLAGS, *machine_flags, *extra_flags, str(_SOURCE), "-o", temporary, "-lm"]
            try:
                result = subprocess.run(command, capture_output=True, text=True)
            except OSError as error:
                raise BuildError(f"can't run {compiler[0]!r}: {error}") from error
            if result.returncode == 0:
                os.replace(temporary, path)
                return path
            # The first failure tells most; the later sets are only for compilers that lack a flag.
            errors = [line for line in result.stderr.splitlines() if "error" in line] or ["no message"]
            message = message or f"{shlex.join(command)}: {errors[0]}"
        raise BuildError(f"compilation failed: {message}")
    finally:
        Path(temporary).unlink(missing_ok=True)


def _cache_directory() -> Path | None:
    """A directory that only this user can write, for what lies in it is executed; None if there is none."""
    root = os.environ.get("QUIRE_CACHE")
    try:
        directory = (Path(root) if root else Path.home() / ".cache" / "quire") / "kernels"
        directory.parent.mkdir(parents=True, exist_ok=True)
        directory.mkdir(mode=0o700, exist_ok=True)
        status = directory.stat()
        ours = status.st_uid == os.getuid() and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
        return directory if ours and os.access(directory, os.W_OK | os.X_OK) else None
    except (OSError, RuntimeError):  # RuntimeError: no home directory
        return None


def _cpu() -> bytes:
    """What -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = [platform.processor()]
    wanted = ("flags", "Features", "model name", "CPU part", "CPU implementer")
    facts = sorted({line for line in lines if line.startswith(wanted)}) if len(lines) > 1 else lines
    return "\n".join([platform.machine(), *facts]).encode()
