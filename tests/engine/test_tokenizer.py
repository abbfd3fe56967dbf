"""Tokenizers of shared/data against transformers, and loading from all the files a directory may hold."""

import json
from datetime import datetime
from pathlib import Path

import pytest

from quire.engine.tokenizer import DecoderKind, Tokenizer
from quire.errors import ModelError, RequestError

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
STORIES, GPT2, MINIMIND = DATA / "models/stories260K", DATA / "tokenizers/gpt2", DATA / "tokenizers/minimind"
pytestmark = pytest.mark.skipif(
    not DATA.is_dir(), reason=f"{DATA} is not here: real tokenizers are not part of the project"
)

ODD = [
    "",
    " ",
    "  two  spaces ",
    "naïve café",
    "日本語のテキスト 🤗👨‍👩‍👧",
    "line\nbreak\ttab",
    "<s>x</s> <|im_start|>",
    "�",
    "a\u0301",
]


def texts():
    sonnets = (DATA / "text/sonnet.txt").read_text().splitlines()
    questions = [
        json.loads(line)["question"] for line in (DATA / "text/gsm8k_test.jsonl").read_text().splitlines()[:100]
    ]
    chats = [json.loads(line)["turns"][0] for line in (DATA / "text/mt_bench_question.jsonl").read_text().splitlines()]
    return [*sonnets, *questions, *chats, *ODD]


def twin(path):
    transformers = pytest.importorskip("transformers")
    if path is GPT2:
        return transformers.GPT2TokenizerFast(str(path / "vocab.json"), str(path / "merges.txt"))
    return transformers.AutoTokenizer.from_pretrained(str(path))


@pytest.fixture(scope="module", params=[STORIES, GPT2, MINIMIND], ids=lambda path: path.name)
def pair(request):
    return Tokenizer.from_dir(request.param), twin(request.param)


def test_encodes_and_decodes_as_transformers_does(pair):
    ours, theirs = pair
    assert len(ours) == len(theirs)
    assert (ours.bos_token_id, ours.eos_token_id) in [
        (theirs.bos_token_id, theirs.eos_token_id),
        (None, None),  # GPT-2's two files name none
    ]
    assert ours.encode_batch(list(texts())) == [ours.encode(text) for text in texts()]
    for text in texts():
        ids = ours.encode(text)
        assert ids == theirs(text)["input_ids"]
        assert ours.encode(text, add_special_tokens=False) == theirs(text, add_special_tokens=False)["input_ids"]
        for skip in (True, False):
            assert ours.decode(ids, skip) == theirs.decode(
                ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False
            )


def test_token_bytes_add_up_to_the_text(pair):
    ours, _ = pair
    for text in texts():
        ids = ours.encode(text, add_special_tokens=False)
        joined = b"".join(map(ours.token_bytes, ids)).decode()
        assert joined[ours.stripped_spaces if joined.startswith(" ") else 0 :] == ours.decode(ids, False)
    assert ours.token_bytes(10**6) == b""
    assert ours.token_text(ours.encode(" the", add_special_tokens=False)[-1]).strip() in ("the", "he", "e")


def test_kinds():
    assert Tokenizer.from_dir(STORIES).decoder_kind is DecoderKind.BYTE_FALLBACK
    assert len(Tokenizer.from_dir(STORIES).byte_token_ids) == 256
    assert Tokenizer.from_dir(MINIMIND).decoder_kind is DecoderKind.BYTE_LEVEL
    assert Tokenizer.from_dir(GPT2).special_ids == {50256}


WEATHER = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": {"a": {}}}},
}
CALL = {"id": "c", "type": "function", "function": {"name": "weather", "arguments": {"city": "Köln <&>"}}}
CHATS = [
    [{"role": "user", "content": "Hi"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi <b>"}],
    [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}],
    [
        {"role": "user", "content": "weather?"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "sun", "tool_call_id": "c"},
    ],
]


@pytest.mark.parametrize("chat", CHATS, ids=["user", "system", "turns", "tool"])
@pytest.mark.parametrize("tools", [None, [WEATHER]], ids=["no tools", "tools"])
@pytest.mark.parametrize("generate", [True, False])
def test_chat_template_as_transformers(chat, tools, generate):
    ours, theirs = Tokenizer.from_dir(MINIMIND), twin(MINIMIND)
    expected = theirs.apply_chat_template(chat, tools=tools, add_generation_prompt=generate, tokenize=False)
    assert ours.apply_chat_template(chat, tools=tools, add_generation_prompt=generate) == expected
    ids = ours.encode_chat(chat, tools=tools, add_generation_prompt=generate)
    assert ids == theirs(expected, add_special_tokens=False)["input_ids"]


def test_chat_inputs_in_the_forms_that_clients_send():
    ours = Tokenizer.from_dir(MINIMIND)
    parts = [{"role": "user", "content": [{"type": "text", "text": "Hi"}, {"type": "text", "text": "you"}]}]
    assert ours.apply_chat_template(parts) == ours.apply_chat_template([{"role": "user", "content": "Hi\nyou"}])
    as_string = {**CALL, "function": {**CALL["function"], "arguments": json.dumps(CALL["function"]["arguments"])}}
    chat = [CHATS[3][0], {"role": "assistant", "content": "", "tool_calls": [as_string]}, CHATS[3][2]]
    assert ours.apply_chat_template(chat) == ours.apply_chat_template(CHATS[3])
    assert chat[1]["tool_calls"][0] is as_string
    for bad in (
        [],
        [{"content": "x"}],
        ["x"],
        [{"role": "user", "content": [{"type": "image_url"}]}],
        [{"role": "user", "content": 3}],
    ):
        with pytest.raises(RequestError) as caught:
            ours.apply_chat_template(bad)
        assert caught.value.param == "messages"


def test_continue_final_message():
    ours, theirs = Tokenizer.from_dir(MINIMIND), twin(MINIMIND)
    for content in ("The answer is", "The answer is "):
        chat = [{"role": "user", "content": "q"}, {"role": "assistant", "content": content}]
        text = ours.apply_chat_template(chat, add_generation_prompt=False, continue_final_message=True)
        assert text == theirs.apply_chat_template(chat, continue_final_message=True, tokenize=False)
        assert text.endswith((content.strip(), content))
    with pytest.raises(RequestError, match="exclude"):
        ours.apply_chat_template(chat, continue_final_message=True)


def with_template(template, **more):
    backend = Tokenizer.from_dir(STORIES).backend
    templates = template if isinstance(template, dict) else {"default": template}
    return Tokenizer(backend, {"bos_token": "<s>"}, templates, clock=lambda: datetime(2024, 7, 9), **more)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{{ bos_token }}{% for m in messages %}{{ m.content }};{% endfor %}", "<s>a<b>é;b;"),
        ("{{ messages[0] | tojson }}", '{"role": "user", "content": "a<b>é"}'),
        ("{{ strftime_now('%Y-%m-%d') }}", "2024-07-09"),
        ("{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ m.role }}{% endfor %}", "user"),
        ("{% generation %}x{{ messages | length }}{% endgeneration %}", "x2"),
        ("  {% if true %}\ny\n  {% endif %}\n", "y\n"),
        ("{{ flavour }}{{ add_generation_prompt }}", "sweetTrue"),
    ],
)
def test_what_templates_may_use(template, expected):
    chat = [{"role": "user", "content": "a<b>é"}, {"role": "user", "content": "b"}]
    assert with_template(template).apply_chat_template(chat, flavour="sweet") == expected


def test_templates_that_refuse_or_break():
    chat = [{"role": "user", "content": "a"}]
    with pytest.raises(RequestError, match="roles must alternate"):
        with_template("{{ raise_exception('roles must alternate') }}").apply_chat_template(chat)
    with pytest.raises(RequestError):  # the sandbox
        with_template("{{ ''.__class__.__mro__ }}{{ messages.append(1) }}").apply_chat_template(chat)
    with pytest.raises(ModelError, match="not valid Jinja"):
        with_template("{% if %}").apply_chat_template(chat)
    with pytest.raises(ModelError, match="no chat template"):
        Tokenizer.from_dir(STORIES).apply_chat_template(chat)
    named = with_template({"default": "d", "tool_use": "t", "rag": "r"})
    assert [named.apply_chat_template(chat), named.apply_chat_template(chat, tools=[WEATHER])] == ["d", "t"]
    assert [named.apply_chat_template(chat, chat_template=x) for x in ("rag", "own{{ 1 }}")] == ["r", "own1"]


def test_a_chat_gets_no_second_bos():
    chat = [{"role": "user", "content": "the"}]
    assert with_template("{{ bos_token }}{{ messages[0].content }}").encode_chat(chat).count(1) == 1
    assert Tokenizer.from_dir(STORIES).encode("the").count(1) == 1


def test_files_of_a_directory(tmp_path):
    with pytest.raises(ModelError, match="holds no tokenizer"):
        Tokenizer.from_dir(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match="cannot be loaded"):
        Tokenizer.from_dir(tmp_path)
    stored = json.loads((STORIES / "tokenizer.json").read_text())
    stored["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    stored["padding"] = {"strategy": {"Fixed": 90}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0}
    stored["padding"] |= {"pad_type_id": 0, "pad_token": "<unk>"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(stored))
    config = {
        "bos_token": {"content": "<s>"},
        "eos_token": "<eot>",
        "added_tokens_decoder": {"512": {"content": "<eot>", "special": True}},
        "chat_template": [{"name": "default", "template": "list"}, {"name": "rag", "template": "rag"}],
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    loaded = Tokenizer.from_dir(tmp_path)
    text = "Once upon a time there was a tokenizer"
    assert loaded.encode(text) == Tokenizer.from_dir(STORIES).encode(text)
    assert (loaded.bos_token_id, loaded.eos_token_id, loaded.vocab_size) == (1, 512, 513)
    assert loaded.encode("a<eot>", add_special_tokens=False)[-1] == 512
    assert loaded.decode([512]) == ""
    assert loaded.chat_templates == {"default": "list", "rag": "rag"}
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "json"}))
    assert Tokenizer.from_dir(tmp_path).chat_templates["default"] == "json"
    (tmp_path / "chat_template.jinja").write_text("jinja")
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates/tool_use.jinja").write_text("tool")
    assert Tokenizer.from_dir(tmp_path).chat_templates == {"default": "jinja", "rag": "rag", "tool_use": "tool"}
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(ModelError, match="JSON object"):
        Tokenizer.from_dir(tmp_path)


def test_bad_words_with_and_without_a_space():
    gpt2 = Tokenizer.from_dir(GPT2)
    assert gpt2.encode_bad_words(["cat"]) == [gpt2.encode("cat"), gpt2.encode(" cat")]


def test_text_that_is_no_unicode_is_the_requests_fault():
    with pytest.raises(RequestError):
        Tokenizer.from_dir(GPT2).encode("\ud800")


def test_appended_text_gets_no_space_of_its_own(stories: Path) -> None:
    """Llama 2's tokenizer puts a space before every text; what goes on another text must not have it."""
    tokenizer = Tokenizer.from_dir(stories)
    start = tokenizer.encode("Once upon a time")
    for text in ("ing", ", and", " a dog", "\n\nThe", "é🙂", "a"):
        assert tokenizer.decode(start + tokenizer.encode_appended(text)) == "Once upon a time" + text
    assert tokenizer.encode_appended("") == []
    with pytest.raises(RequestError):
        tokenizer.encode_appended("\ud800")
