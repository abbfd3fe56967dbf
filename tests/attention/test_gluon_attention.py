"""The Gluon attention kernel against attention in float64, on a Hopper GPU and interpreted; and compiled for one, anywhere.

Run as a program, this file compiles the kernel for sm_90 (no GPU needed) and prints what became of it as JSON.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

if __name__ == "__main__":
    sys.path.insert(0, os.path.dirname(os.path.dirname(__file__)))
    os.environ["TRITON_INTERPRET"] = "0"
import triton_interpreter  # noqa: F401  # isort: skip
import triton
from test_attention_backends import make_case, make_spec
from test_triton_attention import DEVICE, MIXED, check, exact, on_device

from quire.attention.triton import TritonBackend
from quire.kernels import gluon
from quire.kernels.gluon import GluonTile, choose_tile, supports
from quire.kernels.torch_ops import TorchKernels

AVAILABLE = gluon.available(torch.device(DEVICE))
hopper = [pytest.mark.gpu, pytest.mark.skipif(not AVAILABLE, reason="no Hopper GPU on this machine")]
bf16, fp16 = torch.bfloat16, torch.float16
TILES = {
    "64-keys": choose_tile(1024, None),
    "128-keys": choose_tile(1025, None),
    "no-runs": GluonTile(128, 64, 8, 4, 1, 1),
}
assert [tile.num_keys for tile in TILES.values()] == [64, 128, 64]


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[GluonTile]:
    """Tiles that the Gluon kernel was launched for."""
    from quire.kernels.gluon import attention

    found, attend = [], attention.attend

    def counted(*args, **kwargs):
        found.append(args[11])
        attend(*args, **kwargs)

    monkeypatch.setattr(attention, "attend", counted)
    return found


def make_backend(tile: GluonTile | None = None, **options) -> TritonBackend:
    return TritonBackend(TorchKernels(), DEVICE, tiles={"high": tile} if tile else None, **options)


CHUNKS = ((300, 1111, 90, 4000, 65, 17), (300, 111, 70, 33, 65, 17))  # contexts, queries: prompts, chunks of some
CASES = {
    "llama": (make_spec((32, 8), 128, bf16), 16, *CHUNKS),
    "fp16": (make_spec((8, 2), 128, fp16), 16, *CHUNKS),
    "mha-64": (make_spec((4, 4), 64, fp16), 64, *CHUNKS),
    "group-of-2": (make_spec((4, 2), 128, bf16), 32, *CHUNKS),
    "group-of-8": (make_spec((16, 2), 64, bf16), 128, *CHUNKS),
    "mqa-32": (make_spec((32, 1), 128, bf16), 16, *CHUNKS),
    "block-256": (make_spec((8, 2), 128, bf16), 256, *CHUNKS),
    "window": (make_spec((8, 2), 128, bf16, window=100), 16, *CHUNKS),
    "window-64": (make_spec((4, 2), 64, bf16, window=333), 128, *CHUNKS),
    "not-causal": (make_spec((8, 2), 128, bf16, causal=False), 16, *CHUNKS),
    "other-scale": (replace(make_spec((8, 2), 64, bf16), scale=1.7), 32, *CHUNKS),
    "mixed": (make_spec((8, 2), 64, bf16), 16, *MIXED),
}


@pytest.mark.parametrize("tile", ["64-keys", "128-keys"])
@pytest.mark.parametrize("name", [pytest.param(name, marks=hopper) for name in CASES])
def test_is_attention_in_float64(name, tile, launches):
    spec, block_size, contexts, queries = CASES[name]
    check(make_case(spec, block_size, contexts, queries), make_backend(TILES[tile]))
    assert launches == [TILES[tile]]


@pytest.mark.parametrize("name", [pytest.param(name, marks=hopper) for name in ("llama", "window", "not-causal")])
@pytest.mark.parametrize("tile", ["64-keys", "128-keys"])
def test_however_keys_are_cut(name, tile, launches):
    spec, block_size, contexts, queries = CASES[name]
    check(make_case(spec, block_size, contexts, queries), make_backend(TILES[tile], piece=256))
    assert launches


@pytest.mark.parametrize("seed", [pytest.param(seed, marks=hopper) for seed in range(24)])
def test_random_batches(seed, launches):
    rng = np.random.default_rng(seed)
    contexts = rng.integers(17, 2500, rng.integers(1, 7))
    queries = [int(rng.integers(1, c + 1)) if rng.random() < 0.7 else int(c) for c in contexts]
    heads, group = int(rng.integers(1, 4)), (1, 2, 4, 8)[seed % 4]
    spec = make_spec(
        (heads * group, heads), (64, 128)[seed // 4 % 2], (bf16, fp16)[seed % 2],
        window=int(rng.integers(1, 900)) if seed % 5 == 0 else None, causal=seed % 5 == 0 or seed % 7 != 0,
    )  # fmt: skip
    case = make_case(spec, (16, 32, 64, 128)[seed // 2 % 4], contexts.tolist(), queries, seed)
    check(case, make_backend(list(TILES.values())[seed % 3], piece=(None, 384)[seed % 3 == 0]))
    if max(queries) > 128 // group:
        assert launches


@pytest.mark.parametrize("layers", [pytest.param(3, marks=hopper)])
def test_a_graph_of_layers_is_replayed_over_other_steps(layers, launches):
    """What was drawn is counted from 0 again in each layer, with one captured grid for few items and for many."""
    spec = make_spec((32, 8), 128, bf16)
    backend = make_backend()
    buffers = backend.mixed_buffers(spec, bf16, max_num_seqs=8, max_tokens=4096, max_query_len=1024)
    tables = torch.zeros(8, 600, dtype=torch.int32, device=DEVICE)
    pool = torch.full((1600, 2, 2, 8, 16, 128), torch.nan, dtype=bf16, device=DEVICE)
    q = torch.zeros(4096, 32, 128, dtype=bf16, device=DEVICE)
    graph, outputs = torch.cuda.CUDAGraph(), []
    steps = (((2000, 900, 3), (1500, 900, 1)), ((40,), (40,)), ((8000, 1), (17, 1)), ((4000,), (4000,)), ((9,), (1,)))
    for step, (contexts, queries) in enumerate(steps):
        case = make_case(spec, 16, contexts, queries, seed=step)
        tables.zero_()[: len(contexts), : case.batch.block_tables_SB.shape[1]] = case.batch.block_tables_SB.to(DEVICE)
        pool.fill_(torch.nan)[: len(case.pool)] = case.pool.to(DEVICE)
        slots = case.batch.slots_T
        pool[slots // 16, 1, 0, :, slots % 16] = case.k.to(DEVICE)
        pool[slots // 16, 1, 1, :, slots % 16] = case.v.to(DEVICE)
        q[: len(case.q)] = case.q.to(DEVICE)
        plan = backend.plan(replace(on_device(case.batch), block_tables_SB=tables), buffers)
        if step == 0:
            backend.attend(plan, q, pool[:, 1], spec)  # compiles
            torch.cuda.synchronize()
            with torch.cuda.graph(graph):
                outputs = [backend.attend(plan, q, pool[:, 1], spec) for _ in range(layers)]
        for o in outputs:
            o.fill_(torch.nan)
        graph.replay()
        expected = exact(case)
        for o in outputs:
            error = (o[: len(case.q)].cpu().double() - expected).norm() / expected.norm()
            assert error.item() < 1e-2
    assert len(launches) == layers + 1
    assert not any(launch.drawn_2.any() for launch in buffers.launches)


ELSEWHERE = {
    "softcap": (make_spec((8, 2), 128, bf16, softcap=30.0), 16),
    "block-of-8": (make_spec((8, 2), 128, bf16), 8),
    "fp32": (make_spec((8, 2), 128), 16),
    "head-size-80": (make_spec((8, 2), 80, bf16), 16),
    "group-of-3": (make_spec((9, 3), 64, bf16), 16),
}


@pytest.mark.parametrize("name", [pytest.param(name, marks=hopper) for name in ELSEWHERE])
def test_all_else_stays_with_triton(name, launches):
    check(make_case(*ELSEWHERE[name], *CHUNKS), make_backend())
    assert not launches


def test_what_is_supported():
    assert supports(32, 8, 128, bf16)
    assert supports(4, 4, 64, fp16)
    for layer in ((32, 8, 128, torch.float32), (32, 8, 96, bf16), (32, 8, 256, bf16), (9, 3, 64, bf16)):
        assert not supports(*layer)
    assert not gluon.available(torch.device("cpu"))


# -- interpreted, without a card -----------------------------------------------------------------------------------------------
SMALL = {
    "causal": (make_spec((2, 1), 64, bf16), 16, (150, 40), (90, 40), GluonTile(128, 64, 8, 2, 1, 32), None),
    "pieces": (make_spec((2, 1), 128, fp16), 32, (300,), (100,), GluonTile(128, 128, 8, 2, 1, 32), 128),
    "window": (make_spec((4, 2), 64, bf16, window=60), 16, (200,), (130,), GluonTile(128, 64, 8, 2, 1, 1), None),
    "not-causal": (make_spec((4, 4), 64, fp16, causal=False), 128, (90, 210), (65, 70), GluonTile(128, 64, 8, 3, 1, 32), None),
}  # fmt: skip


@pytest.mark.skipif(DEVICE != "cpu", reason="the tests above run the kernel itself")
@pytest.mark.skipif(not triton.__version__.startswith(gluon.TRITON_VERSIONS), reason="not for this version of Triton")
@pytest.mark.parametrize("late", ["copies", "products"])
@pytest.mark.parametrize("name", SMALL)
def test_interpreted(name, late, launches, monkeypatch):
    from gluon_interpreter import interpreted
    from quire.kernels.gluon import attention

    spec, block_size, contexts, queries, tile, piece = SMALL[name]
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(multi_processor_count=2))
    with interpreted(attention, late):
        check(make_case(spec, block_size, contexts, queries), make_backend(tile, **({"piece": piece} if piece else {})))
    assert launches == [tile]


# -- compiled for the card, without one ----------------------------------------------------------------------------------------
def test_compiles_for_the_card_without_spilling():
    if not triton.__version__.startswith(gluon.TRITON_VERSIONS):
        pytest.skip(f"not for Triton {triton.__version__}")
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    result = subprocess.run(
        [sys.executable, __file__], env=environment, capture_output=True, text=True, timeout=200, check=True
    )
    found = json.loads(result.stdout)
    assert len(found) == 4
    for kernel in found:
        assert kernel["spilled_bytes"] == 0, kernel
        assert kernel["matrix_instructions"] >= 64, kernel
        assert kernel["bulk_copies"] > 0, kernel
        assert not kernel["warnings"], kernel  # that products wait for each other, above all
        assert kernel["shared_bytes"] <= 227 * 1024, kernel


def compile_for_sm90(spec, block_size: int, max_query_len: int) -> dict[str, object]:
    from triton.backends.compiler import GPUTarget
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon._runtime import GluonASTSource

    from quire.kernels.gluon import attention

    tile = choose_tile(max_query_len, spec.window)
    group, rows = spec.num_heads // spec.num_kv_heads, tile.num_rows // attention.CONSUMERS
    kernel = attention._attend
    element = {bf16: "bf16", fp16: "fp16"}[spec.kv_dtype]
    constants = {
        "NUM_KV_HEADS": spec.num_kv_heads, "GROUP": group, "HEAD_SIZE": spec.head_size, "BLOCK_SIZE": block_size,
        "ROWS": rows, "KEYS": tile.num_keys, "STAGES": tile.num_stages, "HEAD_RUN": tile.head_run,
        "CAUSAL": spec.causal, "HAS_WINDOW": spec.window is not None, "PDL": True,
    }  # fmt: skip
    types = dict.fromkeys(kernel.arg_names, "i32")
    box = min(block_size, tile.num_keys)
    types["q_desc"] = f"tensordesc<{element}[{rows // group}, {group}, 64],{gl.NVMMASharedLayout(128, 16, rank=3)!r}>"
    types["kv_desc"] = f"tensordesc<{element}[1, 1, {box}, 64],{gl.NVMMASharedLayout(128, 16, rank=4)!r}>"
    types |= {"o_ptr": f"*{element}", "partial_o_ptr": "*fp32", "partial_lse_ptr": "*fp32", "score_scale": "fp32"}
    types |= dict.fromkeys(("tables_ptr", "items_ptr", "count_ptr", "drawn_ptr"), "*i32")
    types |= dict.fromkeys(constants, "constexpr")
    aligned = ("o_ptr", "partial_o_ptr", "partial_lse_ptr")
    compiled = triton.compile(
        GluonASTSource(
            kernel, types, constants, {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned}
        ),
        target=GPUTarget("cuda", 90, 32),
        options={"num_warps": 4, "launch_pdl": True},
    )
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.TemporaryDirectory() as folder:
        ptx, cubin = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        ptx.write_text(compiled.asm["ptx"])
        cubin.write_bytes(compiled.asm["cubin"])
        said = subprocess.run(
            [tools / "ptxas", "-v", "--gpu-name=sm_90a", ptx, "-o", "/dev/null"],
            capture_output=True,
            text=True,
            check=True,
        ).stderr
        code = subprocess.run([tools / "cuobjdump", "-sass", cubin], capture_output=True, text=True, check=True).stdout
    return {
        "spilled_bytes": sum(int(n) for n in re.findall(r"(\d+) bytes (?:spill|stack)", said)),
        "warnings": [line for line in said.splitlines() if re.search(r"warning|\(C\d+\)", line)],
        "matrix_instructions": len(re.findall(r"\bHGMMA\.", code)),
        "bulk_copies": len(re.findall(r"\bUTMALDG\.", code)),
        "shared_bytes": compiled.metadata.shared,
        **constants,
    }


if __name__ == "__main__":
    print(
        json.dumps(
            [
                compile_for_sm90(make_spec((32, 8), 128, bf16), 16, 4096),
                compile_for_sm90(make_spec((8, 1), 128, bf16, causal=False), 64, 512),
                compile_for_sm90(make_spec((32, 8), 128, bf16, window=4096), 16, 4096),
                compile_for_sm90(make_spec((4, 4), 64, fp16), 128, 4096),
            ],
            indent=1,
        )
    )
