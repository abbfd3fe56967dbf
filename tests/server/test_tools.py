"""Tool calls: read out of text in each format, and over HTTP from a model that has learned to make them."""

import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from quire.engine.tokenizer import Tokenizer
from quire.server.options import TOOL_CALL_PARSERS
from quire.server.tool_text import Marks
from quire.server.tools import FORMATS, HERMES, LLAMA3_JSON, MISTRAL, ToolFormat, ToolReader, format_of, gather
from support import TINY_CONFIG, shared_data

Calls = list[tuple[str, str]]
F = ("f", '{"a": "}\\"{<", "b": [1, {}]}')
ONE = '{"name": "f", "arguments": ' + F[1] + "}"
LLAMA_ONE = ONE.replace("arguments", "parameters")


def read(form: ToolFormat, *pieces: str, **options: Any) -> tuple[str, Calls]:
    reader = ToolReader(form, **options)
    events = [event for piece in pieces for event in reader.feed(piece)]
    return gather([*events, *reader.finish()])


# text -> content and calls
CASES: list[tuple[ToolFormat, str, str, Calls]] = [
    (HERMES, f"<tool_call>\n{ONE}\n</tool_call>", "", [F]),
    (HERMES, f"I look.\n<tool_call>{ONE}</tool_call>\n<tool_call>\n{ONE}\n</tool_call>\n", "I look.", [F, F]),
    (HERMES, f"<tool_call>{ONE}\n{ONE}</tool_call> So.", " So.", [F, F]),
    (HERMES, '<tool_call>{"arguments": {"a" :1}, "name": "g"}</tool_call>', "", [("g", '{"a" :1}')]),
    (HERMES, '<tool_call>{"name": "g\\u0021", "parameters": "{\\"a\\": 1}"}', "", [("g!", '{"a": 1}')]),
    (HERMES, '<tool_call>{"name": "g"}</tool_call>', "", [("g", "{}")]),
    (HERMES, '<tool_call>{"type": "function", "name": "g", "arguments": {}, "id": "}"}x', "x", [("g", "{}")]),
    (HERMES, '<tool_call>{"name": "g", "arguments": {"a": 1</tool_call>!', "!", [("g", '{"a": 1')]),
    (HERMES, '<tool_call>{"name": "g", "arguments": {"a": 1}</tool_call>!', "!", [("g", '{"a": 1}')]),
    (HERMES, '<tool_call>{"name": "g", "arguments": {"a": "</tool_call>', "", [("g", '{"a": "</tool_call>')]),
    (LLAMA3_JSON, LLAMA_ONE, "", [F]),
    (LLAMA3_JSON, f" \n<|python_tag|>{LLAMA_ONE} ; {LLAMA_ONE}\n", "", [F, F]),
    (LLAMA3_JSON, f"{LLAMA_ONE}; then", "; then", [F]),
    (LLAMA3_JSON, '{"type": "function", "name": "f", "parameters": {}}', "", [("f", "{}")]),
    (MISTRAL, f"[TOOL_CALLS] [{ONE}, {ONE}]", "", [F, F]),
    (MISTRAL, f"[TOOL_CALLS]{ONE}", "", [F]),
    (MISTRAL, f"Well: [TOOL_CALLS][{ONE[:-1]}, " + '"id": "123456789"}] x', "Well: x", [F]),
]

# what stays text, to the character
NOT_CALLS: list[tuple[ToolFormat, str]] = [
    *(
        (form, text)
        for form in FORMATS.values()
        for text in ("", "Hi", " Hi \n", "a < b [TO] <|py", "\n", '[{"a": 1}]')
    ),
    (HERMES, "<tool_call>"),
    (HERMES, "x <tool_cal"),
    (HERMES, " <tool_call>\nno\n</tool_call> "),
    (HERMES, "<tool_call>" + " " * 100 + ONE),
    (HERMES, '<tool_call>{"name": "f", "arguments": [1]}</tool_call>'),
    (HERMES, '<tool_call>{"name": "f", "arguments": 1 2}</tool_call>'),
    (HERMES, '<tool_call>{"name": "", "arguments": {}}</tool_call>'),
    (HERMES, '<tool_call>{"name": 5, "arguments": {}}</tool_call>'),
    (HERMES, '<tool_call>{"name": "f", "arguments": </tool_call>'),
    (HERMES, '<tool_call>{"name": "f", "argum'),
    (HERMES, '<tool_call>{"name"}</tool_call>'),
    (HERMES, '<tool_call>{"id": "' + "a" * 70_000 + '", "name": "f"}</tool_call>'),
    (HERMES, '<tool_call>{"arguments": ' + "[" * 5000 + "]" * 5000 + ', "name": "f"}'),
    (LLAMA3_JSON, '{"answer": {"name": "f", "parameters": {}}}'),
    (LLAMA3_JSON, '{"name": "Bob"}'),
    (LLAMA3_JSON, f"Say {LLAMA_ONE}"),
    (LLAMA3_JSON, '<|python_tag|>search.call(query="x")'),
    (MISTRAL, "[TOOL_CALLS] []"),
    (MISTRAL, "[TOOL_CALLS] [[]]"),
]


def test_the_options_are_the_formats() -> None:
    assert {"auto", "none", *FORMATS} == set(TOOL_CALL_PARSERS)


@pytest.mark.parametrize(("form", "text", "content", "calls"), CASES)
def test_calls_are_read_however_the_text_is_cut(form: ToolFormat, text: str, content: str, calls: Calls) -> None:
    assert read(form, text) == (content, calls)
    assert read(form, *text) == (content, calls)
    for first in range(len(text)):
        for last in range(first, len(text)):
            assert read(form, text[:first], text[first:last], text[last:]) == (content, calls)


@pytest.mark.parametrize(("form", "text"), NOT_CALLS)
def test_what_is_no_call_is_text(form: ToolFormat, text: str) -> None:
    assert read(form, text) == (text, [])
    if len(text) < 1000:
        for cut in range(len(text)):
            assert read(form, text[:cut], text[cut:]) == (text, [])
        assert read(form, *text) == (text, [])


def test_any_text_is_read_the_same_in_pieces_and_none_is_lost() -> None:
    atoms = [
        *("<tool_call>", "</tool_call>", "[TOOL_CALLS]", "<|python_tag|>", "<|end|>", " ", "\n", " " * 80, "hello"),
        *("{", "}", "[", "]", ",", ";", ": ", '"', "\\", "<", "null", '"name"', '"f"', '"arguments"', '{"a": 1}'),
        *('{"name": "f", "arguments": ', '{"name": "g", "parameters": {}}', '{"arguments": {}, "name": "h"}'),
    ]
    rng = random.Random(0)
    num_with_calls = 0
    for _ in range(1500):
        text = "".join(rng.choices(atoms, k=rng.randrange(1, 14)))
        cuts = sorted(rng.choices(range(len(text) + 1), k=4))
        pieces = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)])]
        options: dict[str, Any] = {
            "only_first": rng.random() < 0.3,
            "hidden": rng.choice([None, Marks(["<|end|>", "<|x|>"])]),
        }
        for form in FORMATS.values():
            content, calls = read(form, text, **options)
            assert read(form, *pieces, **options) == read(form, *text, **options) == (content, calls), text
            num_with_calls += bool(calls)
            assert len(calls) <= 1 or not options["only_first"]
            if not calls and not options["hidden"]:
                assert content == text
    assert num_with_calls > 80


def test_text_and_arguments_are_told_as_they_come() -> None:
    reader = ToolReader(HERMES)
    told = [gather(reader.feed(piece)) for piece in ("Hi", " a <", "b", "\n<tool_")]
    assert [content for content, _ in told] == ["Hi", " a", " <b", ""]
    (begun,) = reader.feed('call>{"name": "f", "arguments":') + reader.feed(" {")[:1]
    assert not isinstance(begun, str) and (begun.index, begun.name, begun.arguments) == (0, "f", "")
    pieces = [event for piece in ('"a": ', "1", "}}") for event in reader.feed(piece)]
    assert [getattr(piece, "arguments", piece) for piece in pieces] == ['"a": ', "1", "}"]


@pytest.mark.parametrize("form", FORMATS.values())
def test_an_opening_makes_a_call(form: ToolFormat) -> None:
    assert read(form, ' {"a": 1}}', opening=form.opening("f")) == ("", [("f", '{"a": 1}')])
    rest = f'g", "{form.arguments}": {{}}}}'
    assert read(form, rest, opening=form.opening(None)) == ("", [("g", "{}")])
    assert read(form, " no", opening=form.opening("f")) == (form.opening("f") + " no", [])


def test_special_tokens_are_taken_out_where_they_cannot_be_skipped() -> None:
    hidden = Marks(["<|eot|>", "<|end|>"])
    assert read(MISTRAL, f"Hi<|eot|>[TOOL_CALLS] [{ONE}]<|end|>", hidden=hidden) == ("Hi", [F])
    assert read(MISTRAL, *"a <|e<|eot|>ot|> <|en", hidden=hidden) == ("a <|eot|> <|en", [])


def test_the_format_is_found_in_the_template() -> None:
    assert format_of('say <tool_call>\n{"name": …, "arguments": …}') is HERMES
    assert format_of("<tool_call>\n<function=f>") is format_of("<tool_call>f<arg_key>") is format_of("plain") is None
    assert format_of("{{ '[TOOL_CALLS] [' }}") is MISTRAL
    assert format_of("{{ '[TOOL_CALLS]' + name + '[ARGS]' }}") is None
    assert (
        format_of("<|python_tag|>") is format_of('use {"name": function name, "parameters": dictionary') is LLAMA3_JSON
    )


# -- over HTTP ---------------------------------------------------------------------------------------------------------------
WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Weather of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
CLOCK: dict[str, Any] = {"type": "function", "function": {"name": "clock", "strict": True}}
TOOLS = [WEATHER, CLOCK]
PARIS, ROME, OSLO = '{"city":  "Paris"}', '{"city": "Rome"}', '{"city": "Oslo"}'


def said(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def written(arguments: str, name: str = "weather") -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


ASK_ONE, ASK_TWO, HELLO = said("Weather in Paris?"), said("Paris and Rome?"), said("Hello")
SUN = [
    ASK_ONE,
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city":"Paris"}'}}
        ],
    },
    {"role": "tool", "tool_call_id": "call_1", "content": "sunny"},
]
# messages, whether tools are offered, what the prompt ends with, what the model then says
LESSONS: list[tuple[list[dict[str, Any]], bool, str, str]] = [
    ([ASK_ONE], True, "", written(PARIS)),
    ([ASK_TWO], True, "", f"I look.\n{written(PARIS)}\n{written(ROME)}"),
    (SUN, True, "", "It is sunny."),
    ([HELLO], True, "", "Hello!"),
    ([ASK_ONE], False, "", "No idea."),
    ([HELLO], True, HERMES.opening("weather"), written(OSLO).removeprefix(HERMES.opening("weather"))),
    ([HELLO], True, HERMES.opening(None), written("{}", "clock").removeprefix(HERMES.opening(None))),
]


@pytest.fixture(scope="module")
def caller(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama that has learned LESSONS by heart."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    source = shared_data("tokenizers/minimind")
    directory = tmp_path_factory.mktemp("model") / "caller"
    config = {**TINY_CONFIG, "hidden_size": 64, "intermediate_size": 128, "vocab_size": 6400}
    config |= {"max_position_embeddings": 1024, "tie_word_embeddings": False}
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config))
    tokenizer = Tokenizer.from_dir(source)
    tools = [{"type": "function", "function": {**tool["function"]}} for tool in TOOLS]
    for tool in tools:
        tool["function"].pop("strict", None)
    prompts, answers = [], []
    for messages, offers, opening, answer in LESSONS:
        text = tokenizer.apply_chat_template(messages, tools=tools if offers else None) + opening
        prompts.append(tokenizer.encode(text, add_special_tokens=False))
        answers.append(tokenizer.encode(answer + "<|im_end|>", add_special_tokens=False))
    rows = [torch.tensor(prompt + answer) for prompt, answer in zip(prompts, answers)]
    inputs = torch.nn.utils.rnn.pad_sequence([row[:-1] for row in rows], batch_first=True)
    targets = torch.tensor([token for answer in answers for token in answer])
    is_asked = torch.zeros_like(inputs, dtype=torch.bool)
    for i, (prompt, answer) in enumerate(zip(prompts, answers)):
        is_asked[i, len(prompt) - 1 : len(prompt) - 1 + len(answer)] = True
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the steps are small: threads that wait for each other make them slow on a busy machine
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    for _ in range(400):
        logits = model.lm_head(model.model(input_ids=inputs).last_hidden_state[is_asked])
        loss = torch.nn.functional.cross_entropy(logits, targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if loss.item() < 0.01:
            break
    torch.set_num_threads(num_threads)
    assert loss.item() < 0.02, f"it has not learned: {loss.item()}"
    model.save_pretrained(directory, safe_serialization=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(source / name, directory / name)
    return directory


@pytest.fixture(scope="module")
def tool_server(make_server: Callable[..., Any], caller: Path) -> Any:
    options = ("--load-format", "auto", "--max-num-seqs", "8", "--num-gpu-blocks-override", "1024")
    return make_server(*options, "--enable-auto-tool-choice", model=caller)


@pytest.fixture(scope="module")
def asks(tool_server: Any) -> Iterator[Callable[..., Any]]:
    """Asks the server; the answers, by choice, as (content, calls, finish reason), streamed or not."""
    with tool_server.client() as client:

        def ask(*messages: Any, stream: bool = False, tools: Any = TOOLS, **options: Any) -> list[Any]:
            options = {"model": "tiny", "temperature": 0, "max_tokens": 200, **options}
            found: Any = client.chat.completions.create(messages=messages, tools=tools, stream=stream, **options)
            return streamed(found) if stream else whole(found)

        yield ask


def whole(found: Any) -> list[Any]:
    answers = []
    for choice in found.choices:
        calls = choice.message.tool_calls or []
        assert len({call.id for call in calls}) == len(calls) and all(call.type == "function" for call in calls)
        told = [(call.function.name, call.function.arguments) for call in calls]
        answers.append((choice.message.content, told, choice.finish_reason))
    return answers


def streamed(chunks: Any) -> list[Any]:
    contents: dict[int, str] = {}
    calls: dict[int, list[list[Any]]] = {}
    ends: dict[int, str] = {}
    for chunk in chunks:
        (choice,) = chunk.choices
        assert choice.index not in ends
        told = calls.setdefault(choice.index, [])
        contents[choice.index] = contents.get(choice.index, "") + (choice.delta.content or "")
        for call in choice.delta.tool_calls or []:
            if call.index == len(told):
                assert call.id and call.type == "function" and call.function.name
                told.append([call.function.name, [], call.id])
            else:
                assert call.id is None and call.function.name is None and call.index == len(told) - 1
            told[call.index][1].append(call.function.arguments)
        if choice.finish_reason:
            ends[choice.index] = choice.finish_reason
    for told in calls.values():
        assert len({call_id for _, _, call_id in told}) == len(told)
        assert all(len(pieces) > 2 or "".join(pieces) == "{}" for _, pieces, _ in told)  # they come as they are written
    return [
        (contents[i] or None, [(name, "".join(pieces)) for name, pieces, _ in calls[i]], ends[i]) for i in sorted(ends)
    ]


both = pytest.mark.parametrize("stream", [False, True])


@both
def test_6_the_arguments_of_a_call_are_a_string(asks: Callable[..., Any], stream: bool) -> None:
    ((content, calls, _),) = asks(ASK_ONE, stream=stream)
    assert content is None
    assert calls == [("weather", PARIS)]  # to the character: two spaces
    assert json.loads(calls[0][1]) == {"city": "Paris"}


@both
def test_7_the_finish_reason_is_tool_calls(asks: Callable[..., Any], stream: bool) -> None:
    answer = ("I look.", [("weather", PARIS), ("weather", ROME)], "tool_calls")
    assert asks(ASK_TWO, stream=stream) == [answer]
    assert asks(ASK_TWO, stream=stream, tool_choice="auto", n=3) == [answer] * 3
    assert asks(HELLO, stream=stream) == [("Hello!", [], "stop")]


@both
def test_an_answer_that_is_cut_off_says_so(asks: Callable[..., Any], stream: bool) -> None:
    ((content, calls, reason),) = asks(ASK_TWO, stream=stream, max_tokens=25)
    assert (content, reason) == ("I look.", "length")
    assert calls[0][0] == "weather" and PARIS.startswith(calls[0][1])


@both
def test_what_a_tool_has_found_goes_into_the_prompt(asks: Callable[..., Any], stream: bool) -> None:
    assert asks(*SUN, stream=stream) == [("It is sunny.", [], "stop")]


@both
def test_tools_that_are_not_to_be_called_are_not_offered(asks: Callable[..., Any], stream: bool) -> None:
    assert asks(ASK_ONE, stream=stream, tool_choice="none") == [("No idea.", [], "stop")]
    assert asks(ASK_ONE, stream=stream, tools=[]) == [("No idea.", [], "stop")]


@both
def test_a_call_can_be_demanded(asks: Callable[..., Any], stream: bool) -> None:
    assert asks(HELLO, stream=stream, tool_choice="required") == [(None, [("clock", "{}")], "tool_calls")]
    named = {"type": "function", "function": {"name": "weather"}}
    # OpenAI: where the function was named, the reason is "stop"
    assert asks(HELLO, stream=stream, tool_choice=named) == [(None, [("weather", OSLO)], "stop")]


@both
def test_calls_can_be_had_one_at_a_time(asks: Callable[..., Any], stream: bool) -> None:
    answer = ("I look.", [("weather", PARIS)], "tool_calls")
    assert asks(ASK_TWO, stream=stream, parallel_tool_calls=False) == [answer]


def test_logprobs_and_token_ids_are_of_all_tokens_whatever_is_held_back(tool_server: Any) -> None:
    options: dict[str, Any] = {
        "model": "tiny",
        "messages": [ASK_TWO],
        "tools": TOOLS,
        "temperature": 0,
        "logprobs": True,
    }
    options["extra_body"] = {"return_token_ids": True}
    with tool_server.client() as client:
        (done,) = client.chat.completions.create(**options).choices
        tokens, ids = [], []
        for chunk in client.chat.completions.create(**options, stream=True):
            (choice,) = chunk.choices
            tokens += [found.token for found in choice.logprobs.content] if choice.logprobs else []
            ids += getattr(choice, "token_ids", [])  # the first chunk has the prompt's instead
    assert tokens == [found.token for found in done.logprobs.content] and ids == done.token_ids
    assert len(tokens) == len(ids) and "<tool_call>" in tokens


def test_markers_that_are_special_tokens_are_seen(
    caller: Path, make_server: Callable[..., Any], tmp_path: Path
) -> None:
    shutil.copytree(caller, tmp_path / "special")
    path = tmp_path / "special" / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    for token in tokenizer["added_tokens"]:
        token["special"] = True
    path.write_text(json.dumps(tokenizer))
    assert Tokenizer.from_dir(path.parent).special_ids >= {21, 22}
    server = make_server("--load-format", "auto", "--num-gpu-blocks-override", "512", model=path.parent)
    options: dict[str, Any] = {"model": "tiny", "messages": [ASK_TWO], "tools": TOOLS, "temperature": 0}
    with server.client() as client:
        for stream, read_answer in ((False, whole), (True, streamed)):
            ((content, calls, reason),) = read_answer(client.chat.completions.create(**options, stream=stream))
            assert (content, calls, reason) == ("I look.", [("weather", PARIS), ("weather", ROME)], "tool_calls")
            go_on: dict[str, Any] = {"max_tokens": 90, "stream": stream, "extra_body": {"ignore_eos": True}}
            ((content, calls, reason),) = read_answer(client.chat.completions.create(**options, **go_on))
            assert content.startswith("I look.") and "<|im_end|>" not in content  # as for who offers no tools
            assert len(calls) >= 2 and reason == "length"


def test_tokens_of_tools_can_be_counted(tool_server: Any) -> None:
    body = {"messages": [ASK_ONE], "tools": TOOLS}
    with tool_server.http() as http:
        count = http.post("/tokenize", json=body).json()["count"]
        done = http.post("/v1/chat/completions", json={**body, "max_tokens": 1}).json()
    assert count == done["usage"]["prompt_tokens"] > 100


def function(**fields: Any) -> dict[str, Any]:
    return {"tools": [{"type": "function", "function": {"name": "f", **fields}}]}


@pytest.mark.parametrize(
    ("options", "param"),
    [
        (function(name=""), "tools"),
        (function(name="a b"), "tools"),
        (function(name="a" * 65), "tools"),
        (function(name=5), "tools"),
        (function(parameters=[]), "tools"),
        (function(parameters="{}"), "tools"),
        (function(nonsense=1), "tools.0.function.nonsense"),
        ({"tools": [{"type": "code", "function": {"name": "f"}}]}, "tools"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"tools": [CLOCK] * 129}, "tools"),
        ({"tools": CLOCK}, "tools"),
        ({**function(), "tool_choice": "f"}, "tool_choice"),
        ({**function(), "tool_choice": {"type": "function", "function": {"name": "g"}}}, "tool_choice"),
        ({**function(), "tool_choice": {"type": "allowed_tools"}}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice"),
        ({"tool_choice": "required", "tools": []}, "tool_choice"),
        ({**function(), "parallel_tool_calls": "no"}, "parallel_tool_calls"),
        ({"functions": [{"name": "f"}]}, "functions"),
    ],
)
def test_tools_that_are_wrong_are_refused_by_name(http: httpx.Client, options: dict[str, Any], param: str) -> None:
    response = http.post("/v1/chat/completions", json={"messages": [HELLO], "max_tokens": 2, **options})
    assert response.status_code == 400 and response.json()["error"]["param"] == param, response.text


def test_a_model_without_a_known_form_of_calls_refuses_tools(make_server: Callable[..., Any]) -> None:
    server = make_server("--num-gpu-blocks-override", "512", "--tool-call-parser", "none")
    with server.client() as client:
        options: dict[str, Any] = {"model": "tiny", "messages": [HELLO], "tools": [CLOCK], "max_tokens": 2}
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(**options)
        assert caught.value.param == "tools" and "--tool-call-parser" in caught.value.message
        assert client.chat.completions.create(**options, tool_choice="none").choices[0].finish_reason
