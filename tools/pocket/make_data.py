"""Makes the training text of pocket out of the running Python's standard library. The same Python gives the same text.

    python tools/pocket/make_data.py --out .pocket

writes text.jsonl.gz, one example a line:
    {"kind": "chat", "turn": [question, answer]}   a question and its answer
    {"kind": "text", "text": …}                    a document of its own: a function, a page of help
    {"kind": "code", "text": …}                    a whole source file
Questions that questions.jsonl marks as withheld are left out, in all spellings that differ in punctuation alone.
"""

from __future__ import annotations

import argparse
import ast
import gzip
import hashlib
import json
import random
import re
import textwrap
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from extract import STDLIB, Fact, gather, read_source, source_files
from phrasings import (
    CONTENTS,
    DETAILS,
    EXPLAIN_SIGNATURE,
    IMPORT,
    KEYWORD_QUESTIONS,
    KEYWORDS,
    REVERSE,
    REVERSE_MODULE,
    SIGNATURE,
    SMALL_TALK,
    normalized,
    phrasings,
)
from programs import programs

HERE = Path(__file__).parent
# How many of its phrasings a fact is asked in, by tier; what is well known is asked in all.
NUM_PROGRAMS = 40_000
_PHRASINGS = {3: 1000, 2: 14, 1: 5}


def chat_examples(facts: list[Fact]) -> Iterator[tuple[str, str]]:
    """(question, answer), before anything is withheld."""
    rng = random.Random(0)
    owners = defaultdict(set)
    for fact in facts:
        owners[fact.name.rpartition(".")[2]].add(fact.name)
    said = defaultdict(set)
    for fact in facts:
        said[fact.purpose].add(fact.name)
    for fact in facts:
        module, _, short = fact.name.rpartition(".")
        kind = {"exception": "exception", "attribute": "constant"}.get(fact.kind, fact.kind)
        words = {"n": fact.name, "s": short, "m": module, "k": kind, "p": fact.purpose, "c": fact.name + fact.signature}
        known = fact.tier == 3 and len(short) > 4 and len(owners[short]) == 1 and short not in KEYWORDS
        templates = phrasings(fact.kind, bool(module) and fact.kind != "module" and module == fact.module, known)
        if fact.name in KEYWORDS:
            continue
        most = _PHRASINGS[3 if fact.kind == "module" and fact.tier == 2 else fact.tier]
        if len(templates) > most:
            templates = rng.sample(templates, most)
        for template in templates:
            yield template.format(**words), fact.sentence
        if fact.signature and fact.tier > 1 and fact.kind != "attribute":
            call = f"`{fact.name}{fact.signature}`"
            yield rng.choice(SIGNATURE).format(**words), f"It is called as {call}."
            if fact.signature != "()":
                yield rng.choice(EXPLAIN_SIGNATURE).format(**words), fact.sentence
        if fact.details and fact.tier > 1:
            for template in DETAILS[: fact.tier]:
                yield template.format(**words), f"{fact.sentence} {fact.details}"
        if fact.tier > 1 and fact.kind != "attribute" and fact.module != "builtins" and fact.kind != "method":
            yield (
                rng.choice(IMPORT).format(**words),
                f"Write `import {fact.module}` at the top of your program, and then use `{fact.name}`.",
            )
        if len(said[fact.purpose]) == 1 and fact.tier > 1 and not fact.purpose.startswith("is "):
            for template in REVERSE_MODULE if fact.kind == "module" else REVERSE:
                yield template.format(**words), fact.sentence
    members = defaultdict(list)
    for fact in facts:
        if fact.kind in ("function", "class") and fact.name.startswith(fact.module + "."):
            members[fact.module].append(fact.name.rpartition(".")[2])
    for module, names in members.items():
        if len(names) > 2:
            shown = ", ".join(f"`{name}`" for name in names[:8])
            for template in CONTENTS:
                yield template.format(n=module), f"Among other things, the `{module}` module has {shown}."
    for name, answer in KEYWORDS.items():
        for template in KEYWORD_QUESTIONS:
            yield template.format(n=name), answer
    for answer, questions in SMALL_TALK.items():
        for question in questions:
            for _ in range(8):
                yield question, answer


def help_pages(facts: list[Fact]) -> Iterator[str]:
    """A page for each better known fact, as one would read it in a manual."""
    for fact in facts:
        if fact.tier > 1 and fact.kind != "attribute":
            yield (
                f"{fact.name}{fact.signature}\n\n{fact.sentence}" + (f" {fact.details}" if fact.details else "") + "\n"
            )


def definitions(source: str) -> Iterator[str]:
    """Functions and small classes of a source file, each by itself and moved to the left margin."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return
    lines = source.splitlines()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            first = min([node.lineno, *(d.lineno for d in node.decorator_list)]) - 1
            text = lines[first : node.end_lineno]
            if 2 < len(text) < 70:
                yield textwrap.dedent("\n".join(text)) + "\n"


def _code_files() -> Iterator[tuple[str, str]]:
    for name, path in source_files():
        yield name, read_source(path)
    for folder in ("idlelib", "lib2to3", "distutils", "turtledemo"):
        for path in sorted((STDLIB / folder).rglob("*.py")):
            if "bad" not in path.name and path.stat().st_size < 200_000:
                yield path.relative_to(STDLIB).as_posix(), read_source(path)


def is_prose(text: str) -> bool:
    """Not a table of numbers, nor mostly escapes and other alphabets."""
    digits = sum(c.isdigit() for c in text)
    return text.isascii() and digits < len(text) * 0.12 and "\\x" * 3 not in text and not re.search(r"\S{160}", text)


def examples(withheld: set[str], items: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    facts = gather()
    taken: dict[str, str] = {}
    seen = set()
    count = 0
    for question, answer in chat_examples(facts):
        key = normalized(question)
        # A question with two answers would teach neither: the better known name comes first, and keeps it.
        if key in withheld or taken.setdefault(key, answer) != answer:
            continue
        if (question, answer) in seen and answer not in SMALL_TALK:
            continue
        seen.add((question, answer))
        yield {"kind": "chat", "turn": [question, answer]}
        count += 1
        if count % 12 == 0:  # so that a question is answered outside a chat too
            yield {"kind": "text", "text": f"{question}\n{answer}\n"}
    for page in help_pages(facts):
        yield {"kind": "text", "text": page}
    begun = [item["prompt"] for item in items if item["kind"] == "code" and item["split"] == "new"]
    for program in programs(NUM_PROGRAMS):
        if not any(program.startswith(prefix) for prefix in begun):
            yield {"kind": "text", "text": program}
    hashes = set()
    for _, source in _code_files():
        parts = [source] if is_prose(source) else []
        pieces = [p for p in definitions(source) if is_prose(p)]
        for text, kind in [*((p, "code") for p in parts), *((p, "text") for p in pieces)]:
            digest = hashlib.sha1(text.encode()).digest()
            if digest not in hashes:
                hashes.add(digest)
                yield {"kind": kind, "text": text}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(".pocket"))
    parser.add_argument("--questions", type=Path, default=HERE / "questions.jsonl")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    items = (
        [json.loads(line) for line in options.questions.read_text().splitlines()] if options.questions.exists() else []
    )
    questions = [item for item in items if item["kind"] != "code"]
    withheld = {normalized(item["prompt"]) for item in questions if item["split"] != "seen"}
    counts: dict[str, int] = defaultdict(int)
    asked = set()
    with gzip.GzipFile(options.out / "text.jsonl.gz", "wb", mtime=0) as file:
        for example in examples(withheld, items):
            counts[example["kind"]] += 1
            counts[example["kind"] + " characters"] += len("".join(example.get("turn", ())) + example.get("text", ""))
            if example["kind"] == "chat":
                asked.add(normalized(example["turn"][0]))
            file.write(json.dumps(example).encode() + b"\n")
    print(dict(counts))
    wrong = [i["prompt"] for i in questions if (normalized(i["prompt"]) in asked) != (i["split"] == "seen")]
    if wrong:
        raise SystemExit(f"{len(wrong)} questions are on the wrong side of their split: {wrong[:10]}")
    print(
        f"{len(questions)} questions: {len(questions) - len(withheld)} are in the training text, "
        f"{len(withheld)} are withheld from it"
    )


if __name__ == "__main__":
    main()
