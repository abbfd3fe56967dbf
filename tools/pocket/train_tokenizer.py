"""Trains pocket's tokenizer, byte-level BPE, and writes the training text as token ids.

    python tools/pocket/train_tokenizer.py --data .pocket

reads text.jsonl.gz and writes tokenizer.json, tokenizer_config.json and tokens.npz:
    chat_ids [sum]  uint16, chat_start [n + 1] int64, chat_answer [n] int64: one question and its answer after the other, with
        the marks of the chat template; the answer (what is learned) begins `chat_answer` tokens after the example's start
    text_ids [sum], text_start [n + 1]: documents, each between two <|endoftext|>
"""

from __future__ import annotations

import argparse
import gzip
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

BOUNDARY, USER, ASSISTANT, END = "<|endoftext|>", "<|user|>", "<|assistant|>", "<|end|>"
SPECIAL = [BOUNDARY, USER, ASSISTANT, END]

# A system's message is left out: the model was never shown one.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "<|user|>{{ message['content'] | trim }}<|end|>"
    "{% elif message['role'] == 'assistant' %}<|assistant|>{{ message['content'] | trim }}<|end|>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def read_examples(data: Path) -> Iterator[dict]:
    with gzip.open(data / "text.jsonl.gz", "rt", encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)


def train(data: Path, vocab_size: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    # A line's end is a token of its own, so that a prefix which ends there is cut as the training text is.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("\n", "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )

    def texts() -> Iterator[str]:
        for example in read_examples(data):
            if example["kind"] == "chat":
                yield from example["turn"]
            elif example["kind"] == "text":
                yield example["text"]

    tokenizer.train_from_iterator(texts(), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOUNDARY} $A", pair=f"{BOUNDARY} $A {BOUNDARY} $B", special_tokens=[(BOUNDARY, 0)]
    )
    return tokenizer


def write_config(out: Path, context: int) -> None:
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOUNDARY,
        "eos_token": END,
        "pad_token": BOUNDARY,
        "model_max_length": context,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (out / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def encode(data: Path, tokenizer: Tokenizer) -> dict[str, np.ndarray]:
    boundary, user, assistant, end = (tokenizer.token_to_id(token) for token in SPECIAL)
    chat: list[np.ndarray] = []
    answers: list[int] = []
    text: list[np.ndarray] = []
    batch: list[dict] = []

    def flush() -> None:
        turns = [part for example in batch if example["kind"] == "chat" for part in example["turn"]]
        pages = [example["text"] for example in batch if example["kind"] != "chat"]
        ids = [encoding.ids for encoding in tokenizer.encode_batch(turns, add_special_tokens=False)]
        for question, answer in zip(ids[::2], ids[1::2]):
            chat.append(np.array([user, *question, end, assistant, *answer, end], np.uint16))
            answers.append(len(question) + 3)
        for encoding in tokenizer.encode_batch(pages, add_special_tokens=False):
            text.append(np.array([boundary, *encoding.ids, boundary], np.uint16))
        batch.clear()

    for example in read_examples(data):
        batch.append(example)
        if len(batch) == 2000:
            flush()
    flush()

    def starts(parts: list[np.ndarray]) -> np.ndarray:
        return np.cumsum([0, *map(len, parts)], dtype=np.int64)

    return {
        "chat_ids": np.concatenate(chat),
        "chat_start": starts(chat),
        "chat_answer": np.array(answers, np.int64),
        "text_ids": np.concatenate(text),
        "text_start": starts(text),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(".pocket"))
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--context", type=int, default=1024)
    options = parser.parse_args()
    tokenizer = train(options.data, options.vocab_size)
    tokenizer.save(str(options.data / "tokenizer.json"), pretty=False)
    write_config(options.data, options.context)
    arrays = encode(options.data, tokenizer)
    np.savez_compressed(options.data / "tokens.npz", **arrays)
    print({name: array.shape for name, array in arrays.items()})
    print("answers:", int((np.diff(arrays["chat_start"]) - arrays["chat_answer"]).sum()), "tokens; longest chat example:",
          int(np.diff(arrays["chat_start"]).max()))  # fmt: skip


if __name__ == "__main__":
    main()
