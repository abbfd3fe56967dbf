"""Text to token ids and back, and chat messages to text, for the tokenizer in a model's directory.

A thin layer over the `tokenizers` library: it adds what lies beside tokenizer.json (special tokens, chat templates) and the
bytes of single tokens. It loads no transformers and no torch, and does not know requests or streams: see `detokenizer.py`.

What a directory may hold, by Hugging Face's names:
    tokenizer.json, or vocab.json + merges.txt            the vocabulary (the latter pair: GPT-2's byte-level BPE)
    tokenizer_config.json, special_tokens_map.json        special tokens, chat_template
    chat_template.jinja, chat_template.json,
    additional_chat_templates/NAME.jinja                  chat templates, which win over the config's
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from enum import Enum
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors

from quire.errors import ModelError, RequestError

Message = Mapping[str, Any]

_SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class DecoderKind(Enum):
    """How token strings become text, which decides how a stream of them can be decoded."""

    BYTE_LEVEL = "byte_level"  # GPT-2's: every token is bytes in disguise, text is their UTF-8
    BYTE_FALLBACK = "byte_fallback"  # SentencePiece's: tokens are text with ▁ for space, or one byte written <0x0A>
    OTHER = "other"


class Tokenizer:
    """The tokenizer of one model.

    vocab_size: tokens, added ones included. bos_token_id, eos_token_id, pad_token_id: None where the tokenizer names none.
    special_ids: what `skip_special_tokens` skips. byte_token_ids: tokens that write a single byte (BYTE_FALLBACK only).
    Safe to share between threads: after loading only caches grow.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        config: Mapping[str, Any] | None = None,
        chat_templates: Mapping[str, str] | None = None,
        clock: Callable[[], datetime] = datetime.now,
    ) -> None:
        """backend: changed in place (truncation and padding off, special tokens added). config: as tokenizer_config.json.
        chat_templates: by name, "default" is the usual one. clock: for templates that print today's date."""
        config = config or {}
        self.backend = backend
        # What a tokenizer.json says about these is left over from training, and would cut prompts silently.
        backend.no_truncation()
        backend.no_padding()
        self.special_tokens = _named_special_tokens(config)
        _add_tokens(backend, config, self.special_tokens)
        self.chat_templates = dict(chat_templates or {})
        self.clock = clock
        self.vocab_size: int = backend.get_vocab_size(with_added_tokens=True)
        self.special_ids = frozenset(
            token_id for token_id, token in backend.get_added_tokens_decoder().items() if token.special
        )
        self.bos_token_id, self.eos_token_id, self.pad_token_id = (
            self._id_of(self.special_tokens.get(name)) for name in ("bos_token", "eos_token", "pad_token")
        )
        self.decoder_kind, self.stripped_spaces = _decoder_kind(backend)
        self.byte_token_ids = frozenset(
            token_id
            for byte in range(256)
            if self.decoder_kind is DecoderKind.BYTE_FALLBACK
            and (token_id := backend.token_to_id(f"<0x{byte:02X}>")) is not None
        )
        self._bytes_of: dict[int, bytes] = {}
        self._compiled: dict[str, jinja2.Template] = {}

    @classmethod
    def from_dir(cls, path: str | Path, clock: Callable[[], datetime] = datetime.now) -> Tokenizer:
        """Load from a model's directory. Raises ModelError if files are missing or bad."""
        path = Path(path)
        config = {**_read_json(path / "special_tokens_map.json"), **_read_json(path / "tokenizer_config.json")}
        return cls(_load_backend(path), config, _load_chat_templates(path, config), clock)

    def _id_of(self, token: str | None) -> int | None:
        return None if token is None else self.backend.token_to_id(token)

    def __len__(self) -> int:
        return self.vocab_size

    # -- text and tokens

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text. add_special_tokens: with what the model expects around a text (a BOS token, often)."""
        try:
            return self.backend.encode(text, add_special_tokens=add_special_tokens).ids
        except (TypeError, UnicodeEncodeError) as error:  # The library calls a lone surrogate a TypeError.
            raise RequestError("the prompt must be a string of valid Unicode", param="prompt") from error

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each, by all cores."""
        try:
            return [encoding.ids for encoding in self.backend.encode_batch_fast(list(texts))]
        except (TypeError, UnicodeEncodeError) as error:
            raise RequestError("prompts must be strings of valid Unicode", param="prompt") from error

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of token ids. Ids that are not in the vocabulary (a model's may be padded) are left out."""
        return self.backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens)

    def token(self, token_id: int) -> str | None:
        """The vocabulary's own string of a token, in its disguise ("Ġthe", "▁the"); None for an unknown id."""
        return self.backend.id_to_token(token_id)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token stands for in the middle of a text; empty for an unknown id. Remembered: streams ask often."""
        known = self._bytes_of.get(token_id)
        if known is None:
            known = self._bytes_of[token_id] = self._find_token_bytes(token_id)
        return known

    def _find_token_bytes(self, token_id: int) -> bytes:
        token = self.backend.id_to_token(token_id)
        if token is None:
            return b""
        if self.decoder_kind is DecoderKind.BYTE_LEVEL:
            table = self._byte_of_char
            # As the library's decoder does: a token with any char outside the table (an added one) stands for itself.
            return bytes(table[c] for c in token) if all(c in table for c in token) else token.encode()
        if token_id in self.byte_token_ids:
            return bytes([int(token[3:5], 16)])
        return token.replace("▁", " ").encode()

    def token_text(self, token_id: int) -> str:
        """`token_bytes` as text for people, U+FFFD where it is part of a character."""
        return self.token_bytes(token_id).decode("utf-8", "replace")

    def encode_appended(self, text: str) -> list[int]:
        """Token ids of a text that goes on another one: without the space that some tokenizers put before every text.

        With Llama 2's, "ing" alone is "▁ing"; behind an anchor it is "ing".
        """
        expected, alone = text.encode("utf-8", "surrogatepass"), self.encode(text, add_special_tokens=False)
        for anchor in ("", "\n", ".", "a"):
            before = self.encode(anchor, add_special_tokens=False)
            both = self.encode(anchor + text, add_special_tokens=False)
            behind = both[len(before) :]
            if both[: len(before)] == before and b"".join(map(self.token_bytes, behind)) == expected:
                return behind
        return alone  # not written as it is: normalized, say

    def encode_bad_words(self, bad_words: Sequence[str]) -> list[list[int]]:
        """Token ids of each word, at the start of a text and, where that differs by the first token only, after a space
        (as vLLM does)."""
        sequences = []
        for word in bad_words:
            bare = self.encode(word.lstrip(), add_special_tokens=False)
            spaced = self.encode(" " + word.lstrip(), add_special_tokens=False)
            sequences.append(bare)
            if spaced and bare and spaced[0] != bare[0] and len(spaced) == len(bare):
                sequences.append(spaced)
        return [sequence for sequence in sequences if sequence]

    @cached_property
    def _byte_of_char(self) -> dict[str, int]:
        """GPT-2's disguise of bytes as printable characters (Radford et al. 2019, the released encoder): those that are
        printable in Latin-1 stand for themselves, the others, in order, are moved to U+0100 and up."""
        printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
        others = [byte for byte in range(256) if byte not in printable]
        return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}

    # -- chat

    def encode_chat(self, messages: Sequence[Message], **options: Any) -> list[int]:
        """Token ids of `apply_chat_template`; the template writes the special tokens, so none are added again."""
        return self.encode(self.apply_chat_template(messages, **options), add_special_tokens=False)

    def apply_chat_template(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template: str | None = None,
        **kwargs: Any,
    ) -> str:
        """The prompt for a chat, as the model's template writes it.

        messages: as OpenAI's; content may be a list of text parts, and tool calls' arguments JSON strings.
        add_generation_prompt: end with the start of the assistant's turn. continue_final_message: end inside the last
        message, so that the model goes on with it. chat_template: a template, or the name of one of the model's, instead
        of the usual one. kwargs: further variables for the template.

        Raises RequestError for messages that the template refuses, ModelError for a template that is missing or broken.
        """
        if continue_final_message and add_generation_prompt:
            raise RequestError(
                "continue_final_message and add_generation_prompt exclude each other: the prompt ends either inside the "
                "last message or at the start of a new one",
                param="continue_final_message",
            )
        if not messages:
            raise RequestError("messages must hold at least one message", param="messages")
        plain = [_plain_message(message) for message in messages]
        template = self._template(self.chat_template_text(chat_template, with_tools=bool(tools)))
        variables = {
            **self.special_tokens,
            "messages": plain,
            "tools": list(tools) if tools else None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
            **kwargs,
        }
        try:
            text = template.render(variables)
        except (
            jinja2.TemplateError,
            TypeError,
            ValueError,
            KeyError,
            AttributeError,
            IndexError,
            OverflowError,
        ) as error:
            raise RequestError(f"the chat template refuses these messages: {error}", param="messages") from error
        return _cut_after_last(text, plain[-1].get("content")) if continue_final_message else text

    def chat_template_text(self, wanted: str | None = None, *, with_tools: bool = False) -> str:
        """The template that `apply_chat_template` uses: `wanted`, the one of that name, or the model's. Raises ModelError."""
        if wanted is not None:
            return self.chat_templates.get(wanted, wanted)
        name = "tool_use" if with_tools and "tool_use" in self.chat_templates else "default"
        if name not in self.chat_templates:
            raise ModelError(
                f"this model has no chat template named {name!r} (it has: {sorted(self.chat_templates) or 'none'}); give "
                "one, or use completions instead of chat"
            )
        return self.chat_templates[name]

    def _template(self, source: str) -> jinja2.Template:
        known = source in self.chat_templates.values()
        if known and source in self._compiled:
            return self._compiled[source]
        try:
            template = self._environment.from_string(source)
        except jinja2.TemplateError as error:
            raise ModelError(f"the chat template is not valid Jinja: {error}") from error
        if known:  # A request's own templates are not kept, or they would pile up.
            self._compiled[source] = template
        return template

    @cached_property
    def _environment(self) -> jinja2.sandbox.ImmutableSandboxedEnvironment:
        """What transformers gives to chat templates. Sandboxed, since templates come with downloaded models."""
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols, _GenerationTag]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = lambda form: self.clock().strftime(form)
        return environment


class _GenerationTag(jinja2.ext.Extension):
    """{% generation %}…{% endgeneration %} marks what to train on; here it is its content."""

    tags = {"generation"}  # noqa: RUF012 - as jinja2 declares it

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own escapes < and > for HTML, which no model was trained on."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _plain_message(message: Message) -> dict[str, Any]:
    """A message as templates expect it: content a string, arguments of tool calls an object."""
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise RequestError("every message must be an object with a role", param="messages")
    plain = dict(message)
    content = plain.get("content")
    if isinstance(content, list):
        plain["content"] = "\n".join(map(_part_text, content))
    elif content is not None and not isinstance(content, str):
        raise RequestError("a message's content must be a string or a list of parts", param="messages")
    if plain.get("tool_calls"):
        plain["tool_calls"] = [_plain_tool_call(call) for call in plain["tool_calls"]]
    return plain


def _part_text(part: Any) -> str:
    if isinstance(part, str):
        return part
    text = part.get("text") if isinstance(part, Mapping) and part.get("type") in ("text", "input_text") else None
    if not isinstance(text, str):
        kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
        raise RequestError(f"content parts must be of type text, got {str(kind)[:40]!r}", param="messages")
    return text


def _plain_tool_call(call: Any) -> Any:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(function["arguments"] or "{}")
    except ValueError:
        return call  # What a model wrote need not be JSON; the template prints it as it is.
    return {**call, "function": {**function, "arguments": arguments}}


def _cut_after_last(text: str, content: Any) -> str:
    """The rendered chat up to the end of its last message's content."""
    if not isinstance(content, str):
        raise RequestError("continue_final_message needs a last message with content", param="messages")
    start = text.rfind(content.strip())
    if start < 0:
        raise RequestError(
            "continue_final_message: the chat template does not print the last message's content as it is",
            param="continue_final_message",
        )
    # Templates often strip what they print; keep the space behind the content where it is there.
    whole = content.lstrip()
    return text[: start + len(whole if text.startswith(whole, start) else content.strip())]


# -- loading


def _read_json(path: Path) -> dict[str, Any]:
    """{} if there is no such file."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} must hold a JSON object")
    return value


def _load_backend(path: Path) -> tokenizers.Tokenizer:
    whole, vocab, merges = path / "tokenizer.json", path / "vocab.json", path / "merges.txt"
    try:
        if whole.is_file():
            return tokenizers.Tokenizer.from_file(str(whole))
        if vocab.is_file() and merges.is_file():
            backend = tokenizers.Tokenizer(models.BPE.from_file(str(vocab), str(merges)))
            backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
            backend.decoder = decoders.ByteLevel()
            backend.post_processor = processors.ByteLevel(trim_offsets=False)
            if backend.token_to_id("<|endoftext|>") is not None:
                backend.add_special_tokens(["<|endoftext|>"])
            return backend
    except Exception as error:  # The library raises plain Exception for a bad file.
        raise ModelError(f"the tokenizer in {path} cannot be loaded: {error}") from error
    raise ModelError(f"{path} holds no tokenizer: neither tokenizer.json nor vocab.json with merges.txt is there")


def _load_chat_templates(path: Path, config: Mapping[str, Any]) -> dict[str, str]:
    templates: dict[str, str] = {}
    # A later source wins over an earlier one.
    for given in (config.get("chat_template"), _read_json(path / "chat_template.json").get("chat_template")):
        if isinstance(given, str):
            templates["default"] = given
        elif isinstance(given, list):
            for entry in given:
                if not (isinstance(entry, dict) and {"name", "template"} <= entry.keys()):
                    raise ModelError(f"{path}: chat_template must be a string or a list of name and template")
                templates[str(entry["name"])] = str(entry["template"])
        elif given is not None:
            raise ModelError(f"{path}: chat_template must be a string or a list of name and template")
    files = [("default", path / "chat_template.jinja")]
    files += [(file.stem, file) for file in sorted((path / "additional_chat_templates").glob("*.jinja"))]
    for name, file in files:
        if file.is_file():
            try:
                templates[name] = file.read_text(encoding="utf-8")
            except (OSError, ValueError) as error:
                raise ModelError(f"{file} cannot be read: {error}") from error
    return templates


def _named_special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """bos_token and the like, each written as a string or as an object with content."""
    named = {}
    for name in _SPECIAL_NAMES:
        value = config.get(name)
        value = value.get("content") if isinstance(value, Mapping) else value
        if isinstance(value, str):
            named[name] = value
    return named


def _add_tokens(backend: tokenizers.Tokenizer, config: Mapping[str, Any], named: Mapping[str, str]) -> None:
    """Add what the config knows and tokenizer.json does not, as transformers does."""
    listed = config.get("added_tokens_decoder") or {}
    for token_id, entry in sorted(listed.items(), key=lambda item: int(item[0])):
        if backend.token_to_id(entry["content"]) is None:
            flags = {flag: bool(entry.get(flag)) for flag in ("lstrip", "rstrip", "single_word", "normalized")}
            backend.add_tokens([AddedToken(entry["content"], special=bool(entry.get("special")), **flags)])
            if backend.token_to_id(entry["content"]) != int(token_id):
                raise ModelError(f"added token {entry['content']!r} cannot have the id {token_id} that its config says")
    special = {token.content for token in backend.get_added_tokens_decoder().values() if token.special}
    backend.add_special_tokens([token for token in dict.fromkeys(named.values()) if token not in special])


def _decoder_kind(backend: tokenizers.Tokenizer) -> tuple[DecoderKind, int]:
    """The kind, and how many spaces at the start of a text are not printed."""
    decoder = json.loads(backend.to_str())["decoder"] or {}
    steps = decoder["decoders"] if decoder.get("type") == "Sequence" else [decoder]
    kinds = [step.get("type") for step in steps]
    if kinds == ["ByteLevel"]:
        return DecoderKind.BYTE_LEVEL, 0
    if kinds[:3] == ["Replace", "ByteFallback", "Fuse"]:
        replace, rest = steps[0], steps[3:]
        if replace.get("pattern") == {"String": "▁"} and replace.get("content") == " ":
            if not rest:
                return DecoderKind.BYTE_FALLBACK, 0
            if len(rest) == 1 and rest[0].get("type") == "Strip" and (rest[0]["content"], rest[0]["stop"]) == (" ", 0):
                return DecoderKind.BYTE_FALLBACK, int(rest[0]["start"])
    return DecoderKind.OTHER, 0
