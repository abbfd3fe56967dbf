"""`quire bench sharing`: its arithmetic, and that it runs."""

import json
from pathlib import Path

import pytest

from quire import cli
from quire.bench.sharing import MEANS, PAPER, WIDTHS, draw_lengths


def test_drawn_lengths_have_the_means_and_fit() -> None:
    lengths, redrawn = draw_lengths(20_000, MEANS["alpaca"], 1.0, 1 << 20, seed=1)
    assert redrawn == 0
    for column, mean in zip(zip(*lengths), MEANS["alpaca"]):
        assert sum(column) / len(lengths) == pytest.approx(mean, rel=0.03)
        assert min(column) == 1
    short, redrawn = draw_lengths(500, MEANS["sharegpt"], 1.0, 512, seed=1)
    assert redrawn > 0
    assert max(map(sum, short)) <= 512
    assert draw_lengths(50, (10, 20), 0.5, 999, seed=2) == draw_lengths(50, (5, 10), 1.0, 999, seed=2)


def test_it_prints_what_the_paper_says_beside_what_it_found(tmp_path: Path) -> None:
    file = tmp_path / "out.json"
    options = ["--num-prompts", "3", "--lengths", "alpaca", "--scale", "0.4", "--block-size", "4", "--json", str(file)]
    assert cli.main(["bench", "sharing", *options]) == 0
    rows = json.loads(file.read_text())["rows"]
    assert len(rows) == 2 * len(WIDTHS)
    assert [row["paper %"] for row in rows] == [*PAPER["alpaca", "samples"], *PAPER["alpaca", "beams"]]
    for row in rows:
        assert 0 < row["saved %"] < 100
        assert row["blocks"] == pytest.approx(row["if not shared"] * (1 - row["saved %"] / 100))
    for kind in (rows[: len(WIDTHS)], rows[len(WIDTHS) :]):
        saved = [row["saved %"] for row in kind]
        assert saved == sorted(saved)  # the more, the more


def test_options_that_make_no_sense_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "sharing", "--num-prompts", "0"]) == 2
    assert "above 0" in capsys.readouterr().err
