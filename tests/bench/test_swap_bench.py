"""`quire bench swap`: that it runs, and that it checks what it moves."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from quire import cli
from quire.kernels.torch_ops import TorchKernels

SMALL = ["--shape", "dummy", "--dtype", "float32", "--num-blocks", "40", "--repeat", "2", "--device", "cpu"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_tells_the_speed_of_both_directions(dtype: str, tmp_path: Path) -> None:
    file = tmp_path / "out.json"
    assert cli.main(["bench", "swap", *SMALL, "--dtype", dtype, "--json", str(file)]) == 0
    found = json.loads(file.read_text())
    rows = found["rows"]
    assert [row["blocks"] for row in rows] == ["neighbours, out", "scattered, out", "neighbours, in", "scattered, in"]
    assert all(row["GB/s"] > 0 and row["of it"] == pytest.approx(row["GB/s"] / row["one copy"]) for row in rows)


def test_blocks_that_come_back_changed_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    swap = TorchKernels.swap_blocks

    def wrong(self: TorchKernels, source: torch.Tensor, target: torch.Tensor, *ids: torch.Tensor) -> None:
        swap(self, source, target, ids[0].roll(1), ids[1])

    monkeypatch.setattr("quire.kernels.select_kernels", lambda device: TorchKernels())
    monkeypatch.setattr(TorchKernels, "swap_blocks", wrong)
    with pytest.raises(AssertionError, match="changed"):
        cli.main(["bench", "swap", *SMALL])


def test_options_that_make_no_sense_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "swap", *SMALL, "--num-blocks", "0"]) == 2
    assert "positive" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "swap", *SMALL, "--device", "cuda"]) == 2
    assert "no CUDA device" in capsys.readouterr().err


def test_scattered_blocks_have_few_neighbours() -> None:
    from argparse import Namespace

    from quire.bench.swap import Moving
    from quire.core.cache_group import form_groups

    args = Namespace(num_blocks=64, block_size=4, dtype="float32", repeat=1)
    pairs = Moving(form_groups([None], 1, 8, "float32"), args, torch.device("cpu"))._pairs
    assert (np.diff(pairs["neighbours"], axis=0) == 1).all()
    assert (np.diff(pairs["scattered"], axis=0) == 1).all(1).sum() < 4
    assert [len(np.unique(column)) for column in pairs["scattered"].T] == [64, 64]
