"""Judges pocket by the 200 items of questions.jsonl: greedy answers, a rule that a reader can check, every item printed.

    python tools/pocket/judge.py                       the embedded model, through quire.LLM
    python tools/pocket/judge.py --model build/pocket --backend torch

A question is answered if the answer
    is a whole sentence: it ended by itself, begins with a capital letter, a quoted name or a digit, ends with a full stop, and
        has at least four words;
    speaks of what was asked: the first name it quotes is the name in the question;
    says the right thing: at least 60 % of the reference's content words stand in it. The reference is the first sentence of
        the documentation; content words are its words without the name itself, without "the", "of", "returns" and their like,
        and cut to their stems. At least 60 % of the answer's own content words must stand in the reference too, so that saying
        much does not help.

A code prefix is continued if, cut after some line, prefix and continuation parse (`ast.parse`), where
    what is cut off is at most 40 % of the continuation, and nothing if it ended by itself (an answer of 160 tokens may stop
        within a statement);
    the continuation adds at least one simple statement that is neither `pass` nor a bare string, and
    no line of it stands there more than three times: it does not run in circles.
"""

from __future__ import annotations

import argparse
import ast
import json
import re
import sys
import warnings
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
QUESTION_TOKENS, CODE_TOKENS = 96, 160
THRESHOLD = 0.6

_EMPTY = """
a an the of to in on for and or with without from by as is are be it its that this which who whose if when where than
then so at into  not no return returns given get gets use used using one same other also can may will do does has have
python module
"""
_EMPTY_WORDS = frozenset(_EMPTY.split())


@dataclass(frozen=True)
class Answer:
    text: str
    finished: bool  # by itself, not cut at the limit


@dataclass(frozen=True)
class Verdict:
    good: bool
    reason: str


def _stem(word: str) -> str:
    for ending in ("ings", "ing", "ies", "ied", "es", "ed", "ly", "s", "e", "y"):
        if word.endswith(ending) and len(word) - len(ending) >= 3:
            return word[: -len(ending)]
    return word


def content_words(text: str, name: str) -> set[str]:
    """Stems of the words that say something, without the name that is asked for."""
    text = text.replace(f"`{name}`", " ")
    return {_stem(word) for word in re.findall(r"[a-z0-9]+", text.lower()) if word not in _EMPTY_WORDS}


def judge_question(item: dict[str, Any], answer: Answer) -> Verdict:
    text, name = answer.text.strip(), item["name"]
    if not answer.finished:
        return Verdict(False, "does not end")
    if not re.match(r"[A-Z`\d]", text) or not text.endswith(".") or len(text.split()) < 4:
        return Verdict(False, "no whole sentence")
    quoted = re.search(r"`([^`]+)`", text)
    if quoted is None or quoted.group(1).removesuffix("()") != name:
        return Verdict(False, f"speaks of {quoted.group(1) if quoted else 'nothing'}")
    wanted, said = content_words(item["reference"], name), content_words(text, name)
    recall = len(wanted & said) / len(wanted)
    precision = len(wanted & said) / max(1, len(said))
    numbers = f"recall {recall:.2f}, precision {precision:.2f}"
    return Verdict(recall >= THRESHOLD and precision >= THRESHOLD, numbers)


def _parse(source: str) -> ast.Module | None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return ast.parse(source)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return None


def judge_code(item: dict[str, Any], answer: Answer) -> Verdict:
    prefix = item["prompt"]
    lines = answer.text.rstrip().split("\n")
    for kept in range(len(lines), 0, -1):
        source = prefix + "\n".join(lines[:kept]) + "\n"
        if (tree := _parse(source)) is not None:
            break
    else:
        return Verdict(False, "does not parse")
    written = [line for line in lines if line.strip()]
    left = [line for line in lines[kept:] if line.strip()]
    if answer.finished and left:
        return Verdict(False, f"ended by itself, and {len(left)} of {len(written)} lines do not parse")
    if len(left) > 0.4 * len(written):
        return Verdict(False, f"{len(left)} of {len(written)} lines do not parse")
    before = (prefix.count("\n") + 1, len(prefix.rpartition("\n")[2]))
    new = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.stmt)
        and not hasattr(node, "body")
        and not isinstance(node, ast.Pass)
        and not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))
        and (node.end_lineno or 0, node.end_col_offset or 0) > before
    ]
    if not new:
        return Verdict(False, "adds no statement")
    most, times = Counter(line.strip() for line in written if len(line.strip()) > 3).most_common(1)[0]
    if times > 3:
        return Verdict(False, f"runs in circles: {most!r} {times} times")
    return Verdict(True, f"{len(new)} statements")


def judge(item: dict[str, Any], answer: Answer) -> Verdict:
    return judge_code(item, answer) if item["kind"] == "code" else judge_question(item, answer)


# -- answering ---------------------------------------------------------------------------------------------------------
def answer_with_quire(model: str, items: Sequence[dict[str, Any]]) -> list[Answer]:
    from quire import LLM, SamplingParams

    with LLM(model) as llm:
        tokenizer = llm.get_tokenizer()
        prompts, params = [], []
        for item in items:
            if item["kind"] == "code":
                prompts.append({"prompt_token_ids": tokenizer.encode(item["prompt"])})
            else:
                prompts.append(
                    {"prompt_token_ids": tokenizer.encode_chat([{"role": "user", "content": item["prompt"]}])}
                )
            params.append(
                SamplingParams(temperature=0, max_tokens=CODE_TOKENS if item["kind"] == "code" else QUESTION_TOKENS)
            )
        outputs = llm.generate(prompts, params)
    return [Answer(o.outputs[0].text, o.outputs[0].finish_reason == "stop") for o in outputs]


def answer_with_torch(directory: str, items: Sequence[dict[str, Any]]) -> list[Answer]:
    """With the model of training, in float32: needs no Quire."""
    import torch
    from model import Pocket, Shape, generate
    from safetensors.torch import load_file
    from tokenizers import Tokenizer

    path = Path(directory)
    config = json.loads((path / "config.json").read_text())
    shape = Shape(
        vocab_size=config["vocab_size"], hidden_size=config["hidden_size"], intermediate_size=config["intermediate_size"],
        num_layers=config["num_hidden_layers"], num_heads=config["num_attention_heads"],
        num_kv_heads=config["num_key_value_heads"], head_dim=config["head_dim"], context=config["max_position_embeddings"],
    )  # fmt: skip
    model = Pocket(shape)
    model.load_state_dict({name: tensor.float() for name, tensor in load_file(path / "model.safetensors").items()})
    model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    stops = set(config["eos_token_id"])
    answers: dict[int, Answer] = {}
    for kind, limit in (("question", QUESTION_TOKENS), ("code", CODE_TOKENS)):
        chosen = [item for item in items if item["kind"] == kind]
        texts = [i["prompt"] if kind == "code" else f"<|user|>{i['prompt']}<|end|><|assistant|>" for i in chosen]
        prompts = [tokenizer.encode(text).ids for text in texts]
        for item, ids in zip(chosen, generate(model, prompts, limit, stops)):
            answers[item["id"]] = Answer(tokenizer.decode(ids), len(ids) < limit)
    return [answers[item["id"]] for item in items]


# -- the report --------------------------------------------------------------------------------------------------------
def report(items: Sequence[dict[str, Any]], answers: Sequence[Answer], show: bool) -> int:
    """Prints the items with their verdicts and the sums by split; the number of good ones."""
    good: dict[tuple[str, str], list[bool]] = defaultdict(list)
    for item, answer in zip(items, answers):
        verdict = judge(item, answer)
        good[item["kind"], item["split"]].append(verdict.good)
        if show:
            print(
                f"--- {item['id']} {item['kind']}, {item['split']}: {'good' if verdict.good else 'BAD'} ({verdict.reason})"
            )
            if item["kind"] == "code":
                print(item["prompt"] + "▶" + answer.text.rstrip())
            else:
                print(f"Q: {item['prompt']}\nA: {answer.text.strip()}")
                if not verdict.good:
                    print(f"   reference: {item['reference']}")
    for (kind, split), verdicts in good.items():
        print(f"{kind:9} {split:13} {sum(verdicts):3} of {len(verdicts)}")
    total = sum(sum(verdicts) for verdicts in good.values())
    print(f"{total} of {len(items)} are good; 150 are asked for")
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a directory; without it, the model inside the package")
    parser.add_argument("--backend", choices=["quire", "torch"], default="quire")
    parser.add_argument("--questions", type=Path, default=HERE / "questions.jsonl")
    parser.add_argument("--brief", action="store_true", help="the sums alone")
    options = parser.parse_args()
    items = [json.loads(line) for line in options.questions.read_text().splitlines()]
    if options.model is None:
        from quire.pocket import model_directory

        options.model = str(model_directory())
    answers = (answer_with_quire if options.backend == "quire" else answer_with_torch)(options.model, items)
    sys.exit(report(items, answers, not options.brief) < 150)


if __name__ == "__main__":
    main()
