"""The command line: errors in one line, nothing loaded that isn't needed."""

import argparse
import os
import subprocess
import sys

import pytest

import quire.bench
from quire import cli
from quire.config import EngineConfig
from quire.errors import ConfigError


def test_help_is_fast_and_loads_no_torch():
    code = (
        "import sys\nfrom quire.cli import main\n"
        "try: main(sys.argv[1:])\nexcept SystemExit as end: assert not end.code\n"
        "assert not {'torch', 'rich', 'tokenizers', 'numpy'} & sys.modules.keys(), sorted(sys.modules)"
    )
    for argv in (["--help"], ["generate", "--help"], ["bench"], ["--version"]):
        subprocess.run([sys.executable, "-c", code, *argv], check=True, stdout=subprocess.DEVNULL)


def test_module_runs_as_command():
    result = subprocess.run([sys.executable, "-m", "quire", "--version"], check=True, capture_output=True, text=True)
    assert result.stdout == f"quire {quire.__version__}\n"


def test_no_command_prints_help(capsys):
    assert cli.main([]) == 2
    assert "generate" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--max-num-seq", "3"], "unknown option --max-num-seq; did you mean --max-num-seqs?"),
        (["--tempratur=3"], "unknown option --tempratur; did you mean --temperature?"),
        (["--max-num-seqs", "many"], "argument --max-num-seqs: invalid int value: 'many'"),
        (["--max-model-len", "many"], "argument --max-model-len: 'many' is not a number"),
        (["--max-num-seqs", "0"], "max_num_seqs must be an integer from 1"),
        (["--dtype", "int3"], "dtype='int3' is not one of auto, float32"),
        (["--logit-bias", "[1]"], "argument --logit-bias: '[1]' is not a JSON object"),
        (["--stop-token-ids", "1;2"], "argument --stop-token-ids: '1;2' is not a list"),
        (["--early-stopping", "soon"], "argument --early-stopping: 'soon' is not one of yes, no, never"),
        (["--best-of", "2", "--n", "3"], "best_of must be at least n"),
        (["--top-p", "2"], "top_p must be a finite number"),
        (["--json", "-"], "cannot both go to stdout"),
    ],
)
def test_mistake_is_one_line(argv, message, capsys):
    assert cli.main(["generate", "--model", "m", *argv]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and message in err and err.count("\n") == 1


def test_missing_model(capsys):
    assert cli.main(["generate"]) == 2
    assert "--model" in capsys.readouterr().err


@pytest.mark.parametrize("way", ["option", "environment"])
def test_debug_shows_the_traceback(way, monkeypatch):
    argv = ["generate", "--model", "m", "--top-k", "x"]
    if way == "environment":
        monkeypatch.setenv("QUIRE_DEBUG", "1")
    else:
        argv.append("--debug")
    with pytest.raises(ConfigError):
        cli.main(argv)


# -- quire bench -----------------------------------------------------------------------------------------------------------
@pytest.fixture
def benches(tmp_path, monkeypatch):
    """Three modules: a benchmark, a benchmark that cannot be imported, and one that only helps."""
    (tmp_path / "pretend_ok.py").write_text(
        'HELP: str = "counts to N"\n'
        "def add_arguments(parser): parser.add_argument('--num', type=int, default=1)\n"
        "def run(args):\n"
        "    if args.num == 99: raise KeyboardInterrupt\n"
        "    print('ran', args.num)\n"
        "    return args.num\n"
    )
    (tmp_path / "pretend_broken.py").write_text('HELP = "breaks"\nraise RuntimeError\n')
    (tmp_path / "pretend_helper.py").write_text("raise RuntimeError\n")
    monkeypatch.setattr(quire.bench, "__path__", [str(tmp_path)])
    yield
    sys.modules.pop("quire.bench.pretend_ok", None)


@pytest.mark.usefixtures("benches")
class TestBench:
    def test_list_imports_none(self, capsys):
        assert cli.main(["bench"]) == 0
        assert capsys.readouterr().out == "pretend_broken  breaks\npretend_ok      counts to N\n"

    def test_run(self, capsys):
        assert cli.main(["bench", "pretend_ok", "--num", "3"]) == 3
        assert capsys.readouterr().out == "ran 3\n"

    def test_help_of_one(self, capsys):
        with pytest.raises(SystemExit):
            cli.main(["bench", "pretend_ok", "--help"])
        assert "counts to N" in capsys.readouterr().out

    def test_unknown_option(self, capsys):
        assert cli.main(["bench", "pretend_ok", "--mum", "3"]) == 2
        assert "did you mean --num?" in capsys.readouterr().err

    def test_unknown_name(self, capsys):
        assert cli.main(["bench", "pretend_helper"]) == 2
        assert "there is no benchmark pretend_helper; there are: pretend_broken, pretend_ok" in capsys.readouterr().err

    def test_interrupt(self):
        assert cli.main(["bench", "pretend_ok", "--num", "99"]) == 130


def test_real_benches_are_found():
    for name, text in cli.find_benches().items():
        assert name.isidentifier() and text


def test_broken_pipe_is_quiet():
    read_end, write_end = os.pipe()
    os.close(read_end)
    result = subprocess.run([sys.executable, "-m", "quire", "bench"], stdout=write_end, stderr=subprocess.PIPE)
    os.close(write_end)
    assert (result.returncode, result.stderr) == (141, b"")


def test_parser_keeps_argparse_types():
    assert isinstance(cli.build_parser(), argparse.ArgumentParser)


def test_without_a_model_the_embedded_one_is_served() -> None:
    from quire import pocket
    from quire.errors import ModelError

    try:
        directory = str(pocket.model_directory())
    except ModelError as error:
        pytest.skip(str(error))
    args = cli.build_parser().parse_args(["serve"])
    assert cli._model_to_serve(args) == directory
    assert EngineConfig(model=directory).model_name == "pocket"
    assert EngineConfig(model="some/model").model_name == "some/model"
