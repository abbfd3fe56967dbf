"""Streams of text: pieces add up to the whole, and stop strings never leak."""

import json
import random
from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from quire.engine.detokenizer import IncrementalDetokenizer, StopMatch, _WindowStream, text_stream
from quire.engine.tokenizer import DecoderKind, Tokenizer
from quire.sampling_params import SamplingParams

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
STORIES, GPT2, MINIMIND = DATA / "models/stories260K", DATA / "tokenizers/gpt2", DATA / "tokenizers/minimind"
pytestmark = pytest.mark.skipif(
    not DATA.is_dir(), reason=f"{DATA} is not here: real tokenizers are not part of the project"
)


@pytest.fixture(scope="module", params=[STORIES, GPT2, MINIMIND], ids=lambda path: path.name)
def tokenizer(request):
    return Tokenizer.from_dir(request.param)


@pytest.fixture(scope="module")
def gpt2():
    return Tokenizer.from_dir(GPT2)


def texts():
    lines = (DATA / "text/gsm8k_test.jsonl").read_text().splitlines()[:60]
    odd = ["日本語のテキスト 🤗👨‍👩‍👧 fin", "  two  spaces ", "a\u0301é\n\n x", "🤗"]
    return [*(json.loads(line)["answer"] for line in lines), *odd]


def stream(tokenizer, prompt, ids, rng=None, **params):
    """Deltas of a sequence whose tokens arrive in bursts of 1 to 3."""
    detokenizer = IncrementalDetokenizer(tokenizer, prompt, SamplingParams(max_tokens=None, **params))
    deltas, at, shown = [], 0, ""
    while at < len(ids):
        burst = ids[at : at + (rng.randint(1, 3) if rng else 1)]
        at += len(burst)
        match = detokenizer.append(burst)
        deltas.append(detokenizer.take_delta(finished=match is not None))
        shown += deltas[-1]
        assert detokenizer.shown_text(finished=False) == shown
        if match:
            break
    deltas.append(detokenizer.take_delta(finished=True))
    assert "".join(deltas) == detokenizer.text == detokenizer.shown_text(finished=True)
    return deltas


def test_real_text_adds_up_to_the_whole_decode(tokenizer):
    rng = random.Random(0)
    for text in texts():
        ids = tokenizer.encode(text)
        cut = rng.randint(0, len(ids))
        for prompt, output in (([], ids), (ids[:cut], ids[cut:])):
            whole, before = tokenizer.decode(ids), tokenizer.decode(prompt)
            if before.endswith("\ufffd"):
                continue  # the cut is inside a character
            assert "".join(stream(tokenizer, prompt, output, rng)) == whole[len(before) :]


@pytest.mark.parametrize("skip", [True, False])
def test_random_ids_add_up_to_the_whole_decode(tokenizer, skip):
    rng = random.Random(1)
    usable = [token_id for token_id in range(tokenizer.vocab_size + 3) if token_id not in tokenizer.byte_token_ids]
    for _ in range(300):
        ids = rng.choices(usable, k=rng.randint(0, 60)) + rng.choices(range(12), k=3)
        ids = [token_id for token_id in ids if token_id not in tokenizer.byte_token_ids]
        rng.shuffle(ids)
        assert "".join(stream(tokenizer, [], ids, rng, skip_special_tokens=skip)) == tokenizer.decode(ids, skip)


def test_byte_runs_show_whole_characters_and_mark_each_wrong_byte():
    stories = Tokenizer.from_dir(STORIES)
    byte = {value: stories.backend.token_to_id(f"<0x{value:02X}>") for value in range(256)}
    smile = [byte[value] for value in "🤗".encode()]
    word = stories.backend.token_to_id("▁the")
    assert stream(stories, [word], smile) == ["", "", "", "🤗", ""]
    assert "".join(stream(stories, [word], [*smile, *smile[:2], word])) == "🤗\ufffd\ufffd the"
    assert "".join(stream(stories, [word], [*smile[:3]])) == "\ufffd" * 3
    assert "".join(stream(stories, [word], [byte[0xFF], *smile, byte[0x41]])) == "\ufffd🤗A"
    rng = random.Random(2)
    for _ in range(300):  # where the run is valid UTF-8, exactly as the library
        text = "".join(rng.choice("aé語🤗 \n") for _ in range(8))
        ids = [word, *(byte[value] for value in text.encode()), word]
        assert "".join(stream(stories, [], ids, rng)) == stories.decode(ids)


def test_leading_space_belongs_to_the_place():
    stories = Tokenizer.from_dir(STORIES)
    ids = stories.encode("the cat", add_special_tokens=False)
    assert "".join(stream(stories, [stories.bos_token_id], ids)) == "the cat"
    assert "".join(stream(stories, stories.encode("see"), ids)) == " the cat"
    assert "".join(stream(stories, [stories.bos_token_id], ids, skip_special_tokens=False)) == " the cat"


def test_half_a_character_is_held_back(gpt2):
    ids = gpt2.encode("🤗")
    assert len(ids) > 1
    assert stream(gpt2, [], ids) == [""] * (len(ids) - 1) + ["🤗", ""]
    assert stream(gpt2, [], [*ids[:-1], *gpt2.encode("x")])[-2:] == ["\ufffdx", ""]
    # A prompt that ends inside a character: the output completes it.
    assert "".join(stream(gpt2, ids[:1], ids[1:])) == "🤗"


def test_unknown_decoders_go_through_a_window():
    backend = tokenizers.Tokenizer(
        models.WordLevel({f"▁w{i}": i for i in range(20)} | {"x": 20, "🤗": 21}, unk_token="x")
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    other = Tokenizer(backend)
    assert other.decoder_kind is DecoderKind.OTHER
    rng = random.Random(3)
    for _ in range(200):
        ids = rng.choices(range(22), k=rng.randint(1, 30))
        cut = rng.randint(0, len(ids))
        text = "".join(stream(other, ids[:cut], ids[cut:], rng))
        assert text == other.decode(ids)[len(other.decode(ids[:cut])) :]


class Letters:
    """A pretend tokenizer: a token is up to four letters, so that stop strings fall on all borders."""

    decoder_kind, special_ids, stripped_spaces, byte_token_ids = DecoderKind.BYTE_LEVEL, frozenset(), 0, frozenset()

    def __init__(self):
        self.words = ["a", "b", "c", "ab", "bc", "ca", "abc", "aab", "abca", "cab"]

    def token_bytes(self, token_id):
        return self.words[token_id].encode()


def first_stop(text, ends, stops, min_tokens):
    """(start, end) of the stop string that is complete first, by trying every end."""
    for end in range(1, len(text) + 1):
        num_tokens = 1 + next(i for i, token_end in enumerate(ends) if token_end >= end)
        hits = [stop for stop in stops if text[:end].endswith(stop)]
        if hits and num_tokens > min_tokens:
            longest = max(hits, key=len)
            return end - len(longest), end, longest, num_tokens
    return None


@pytest.mark.parametrize("include", [False, True])
def test_stop_strings_against_a_letter_by_letter_search(include):
    letters, rng = Letters(), random.Random(4)
    stopped = 0
    for _ in range(3000):
        ids = rng.choices(range(10), k=rng.randint(1, 8))
        stops = ["".join(rng.choices("abc", k=rng.randint(1, 5))) for _ in range(rng.randint(1, 3))]
        min_tokens = rng.choice([0, 0, 2])
        text, ends = "", []
        for token_id in ids:
            text += letters.words[token_id]
            ends.append(len(text))
        params = SamplingParams(stop=stops, include_stop_str_in_output=include, min_tokens=min_tokens, max_tokens=None)
        detokenizer = IncrementalDetokenizer(letters, [], params)
        found, shown, at = None, "", 0
        while at < len(ids) and found is None:
            burst = ids[at : at + rng.randint(1, 3)]
            found = detokenizer.append(burst)
            delta = detokenizer.take_delta(finished=found is not None)
            shown += delta
            assert text.startswith(shown)
            at += len(burst) if found is None else found.num_tokens
        shown += detokenizer.take_delta(finished=True)
        expected = first_stop(text, ends, stops, min_tokens)
        if expected is None:
            assert found is None
            assert shown == text == detokenizer.text
        else:
            stopped += 1
            start, end, stop, num_tokens = expected
            assert found is not None
            assert (found.stop_string, at) == (stop, num_tokens)
            assert shown == detokenizer.text == text[: end if include else start]
    assert stopped > 1000


def test_what_is_held_back_is_no_more_than_needed(gpt2):
    ids = [gpt2.encode(piece)[0] for piece in ("a", " E", "N", "O", " E", "N", "D")]
    assert stream(gpt2, [], ids, stop="END") == ["a", " ", "", "ENO", " ", "", "", ""]
    assert "".join(stream(gpt2, [], ids, stop="END", include_stop_str_in_output=True)) == "a ENO END"
    detokenizer = IncrementalDetokenizer(gpt2, [], SamplingParams(stop=["NO"]))
    assert detokenizer.append(ids) == StopMatch("NO", 4)
    assert detokenizer.text == "a E"


def test_a_stop_token_gives_no_text_unless_asked(gpt2):
    ids = gpt2.encode("one two")
    for include, expected in ((False, "one"), (True, "one two")):
        detokenizer = IncrementalDetokenizer(gpt2, [], SamplingParams(include_stop_str_in_output=include))
        assert detokenizer.append(ids, stop_terminated=True) is None
        assert detokenizer.take_delta(finished=True) == expected


@pytest.mark.parametrize("kwargs", [{"detokenize": False}, {}])
def test_no_text_without_a_tokenizer_or_when_not_asked(gpt2, kwargs):
    detokenizer = IncrementalDetokenizer(gpt2 if kwargs else None, [1], SamplingParams(**kwargs))
    assert detokenizer.append([1, 2, 3]) is None
    assert (detokenizer.take_delta(True), detokenizer.num_tokens) == ("", 3)


def test_a_stream_of_broken_bytes_does_not_grow_without_end(gpt2):
    broken = gpt2.encode("🤗")[0]
    one = text_stream(gpt2, [], True)
    assert len("".join(one.push(broken) for _ in range(1000))) >= 998
    backend = tokenizers.Tokenizer(models.WordLevel({"<0xF0>": 0, "x": 1}, unk_token="x"))
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    other = text_stream(Tokenizer(backend), [], True)
    assert isinstance(other, _WindowStream)
    assert len("".join(other.push(0) for _ in range(1000))) >= 990
    assert len(other._ids) < 10
