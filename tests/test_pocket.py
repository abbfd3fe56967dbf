"""The model inside the package: it is there, it is small, and it answers in whole sentences."""

import subprocess
import sys

import pytest

from quire import LLM, SamplingParams, pocket
from quire.errors import ModelError

MOST_BYTES = 16_000_000


@pytest.fixture(scope="module")
def directory():
    try:
        return pocket.model_directory()
    except ModelError as error:
        pytest.skip(str(error))


def test_all_its_files_take_at_most_16_megabytes(directory):
    assert sum(path.stat().st_size for path in directory.rglob("*") if path.is_file()) <= MOST_BYTES


def test_it_answers_in_whole_sentences(directory):
    wanted = {
        "What does itertools.chain do?": ("`itertools.chain`", "iterable"),
        "What does math.sqrt do?": ("`math.sqrt`", "square root"),
        "What is the json module?": ("`json`", "JSON"),
    }
    with LLM(str(directory), num_gpu_blocks_override=64) as llm:
        outputs = llm.chat(
            [[{"role": "user", "content": question}] for question in wanted],
            SamplingParams(temperature=0, max_tokens=96),
            use_tqdm=False,
        )
    for (question, words), output in zip(wanted.items(), outputs):
        answer = output.outputs[0]
        assert answer.finish_reason == "stop", question
        assert answer.text.endswith("."), question
        assert all(word in answer.text for word in words), (question, answer.text)


def test_missing_weights_are_named(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr(pocket, "files", lambda _: tmp_path)
    with pytest.raises(ModelError, match=r"model\.safetensors"):
        pocket.model_directory()


def test_an_archive_is_refused(monkeypatch):
    monkeypatch.setattr(pocket, "files", lambda _: "quire.zip/quire/pocket")
    with pytest.raises(ModelError, match="archive"):
        pocket.model_directory()


def test_finding_it_loads_no_torch():
    code = "import sys, quire.pocket; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
