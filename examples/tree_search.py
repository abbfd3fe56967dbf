"""A small tree search by forking: several continuations of a prompt run at once, the worse are killed, the better branch again.

    python examples/tree_search.py
    python examples/tree_search.py --chat "What does itertools.groupby do?"
    python examples/tree_search.py --model path/to/model --width 4 --keep 2 --depth 3 --chunk 16 "Once upon a time"

At each level every node that is left goes on, and `width - 1` branches are forked from where it is. When all of them have
`chunk` tokens more they are scored, by the mean log probability of their tokens; the `keep` best stay, the others are killed.
Those that stay at the end run to their ends, and the best of them is the answer.

A branch shares its parent's blocks of keys and values, and copies one when it writes into it. What that saves is measured as
the search goes on: blocks that are held, beside those that copies of each branch would take.
"""

from __future__ import annotations

import argparse
import asyncio
import heapq
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from quire import AsyncEngine, RequestOutput, SamplingParams
from quire.errors import QuireError
from quire.pocket import model_directory

CODE = '''def count_words(text):
    """Return a dictionary of the words in the text and how often each of them is there."""
    counts = {}
    for word in text.split():
'''


@dataclass(frozen=True)
class Options:
    width: int = 4  # nodes that each node of a level becomes, itself among them
    keep: int = 2  # of a level's nodes
    depth: int = 3  # levels
    chunk: int = 12  # tokens of a level
    max_tokens: int = 96  # of an answer
    temperature: float = 0.8
    seed: int = 0


@dataclass(eq=False)
class Node:
    """A request that runs, or did: the root, or a branch of `parent` that began behind `start` of its tokens."""

    request_id: str
    outputs: AsyncIterator[RequestOutput]
    parent: Node | None = None
    children: list[Node] = field(default_factory=list)
    last: RequestOutput | None = None
    level: int = 0
    fate: str = "runs"

    @property
    def logprobs(self) -> list[float]:
        """Of its own tokens."""
        found = self.last.outputs[0].logprobs if self.last else None
        return [next(iter(position.values())).logprob for position in found or ()]

    @property
    def start(self) -> int:
        """Tokens between the search's prompt and its own."""
        root = self
        while root.parent is not None:
            root = root.parent
        assert self.last is not None and root.last is not None
        return len(self.last.prompt_token_ids or ()) - len(root.last.prompt_token_ids or ())

    @property
    def is_over(self) -> bool:
        return self.last is not None and self.last.finished

    @property
    def text(self) -> str:
        """Its own; token ids where there is no tokenizer."""
        if self.last is None:
            return ""
        output = self.last.outputs[0]
        return output.text or " ".join(map(str, output.token_ids))

    def path(self) -> list[tuple[Node, int]]:
        """The nodes from the root to this one, and how many tokens of each come before the next one's."""
        if self.parent is None:
            return [(self, len(self.logprobs))]
        above = self.parent.path()
        return [*above[:-1], (self.parent, self.start - self.parent.start), (self, len(self.logprobs))]

    def score(self) -> float:
        """Mean log probability of all tokens from the prompt on."""
        found = [logprob for node, count in self.path() for logprob in node.logprobs[:count]]
        return sum(found) / max(len(found), 1)

    async def read(self, num_tokens: int) -> None:
        """Until it has so many tokens of its own, or ends."""
        while not self.is_over and len(self.logprobs) < num_tokens:
            self.last = await anext(self.outputs)


@dataclass(frozen=True)
class Level:
    """What was in memory at a level's end: blocks, and those that it would take if none were shared."""

    num_nodes: int
    num_killed: int
    num_blocks: int
    num_copied: int


@dataclass(frozen=True)
class Result:
    root: Node
    best: Node
    levels: list[Level]


async def search(engine: AsyncEngine, prompt: Any, options: Options) -> Result:
    """`prompt` is whatever `AsyncEngine.generate` takes. Raises RequestError if it is wrong or does not fit."""
    params = SamplingParams(
        temperature=options.temperature, max_tokens=options.max_tokens, seed=options.seed, logprobs=0
    )
    root = Node("root", engine.generate(prompt, params, "root"))
    await root.read(1)
    leaves, levels = [root], []
    for level in range(1, options.depth + 1):
        if all(node.is_over for node in leaves):
            break
        before = {node: len(node.logprobs) for node in leaves}
        for node in list(leaves):
            leaves += await expand(engine, node, options.width - 1, level)
        await asyncio.gather(*(node.read(before.get(node, 0) + options.chunk) for node in leaves))
        # a branch may have begun behind what was read of its parent: its score needs what lies between
        await asyncio.gather(*(node.parent.read(node.start - node.parent.start) for node in leaves if node.parent))
        usage, block_size = await engine.slot_usage(), engine.engine.config.block_size
        kept = heapq.nlargest(options.keep, leaves, key=Node.score)
        for node in leaves:
            node.fate = "kept" if node in kept else "killed"
        killed = [node for node in leaves if node not in kept]
        await asyncio.gather(*(engine.abort(node.request_id) for node in killed))
        num_blocks = usage.allocated // block_size
        levels.append(Level(len(leaves), len(killed), num_blocks, num_blocks + usage.shared // block_size))
        leaves = kept
    await asyncio.gather(*(node.read(options.max_tokens) for node in leaves))
    best = max(leaves, key=Node.score)
    best.fate = "answer"
    return Result(root, best, levels)


async def expand(engine: AsyncEngine, node: Node, count: int, level: int) -> list[Node]:
    """Branches of a node; none of one that has ended."""
    if node.is_over or not count:
        return []
    try:
        branches = await engine.fork(node.request_id, count)
    except QuireError:
        return []  # it has ended meanwhile: what it said is still to be read
    made = [Node(branch.request_id, branch.outputs, parent=node, level=level) for branch in branches]
    node.children += made
    return made


# -- what is printed ---------------------------------------------------------------------------------------------------------
def answer_of(engine: AsyncEngine, best: Node) -> str:
    """The whole text along the path to the best node."""
    token_ids = [token for node, count in best.path() if node.last for token in node.last.outputs[0].token_ids[:count]]
    tokenizer = engine.engine.tokenizer
    return " ".join(map(str, token_ids)) if tokenizer is None else tokenizer.decode(token_ids)


def draw(node: Node) -> Tree:
    styles = {"killed": "dim", "kept": "", "answer": "bold green"}
    line = node.text.replace("\n", "⏎")
    label = Text(f"{node.score():6.2f} {node.fate:7} ", style=styles.get(node.fate, ""))
    tree = Tree(label.append(line if len(line) <= 60 else line[:59] + "…"))
    for child in node.children:
        tree.add(draw(child))
    return tree


def memory_table(levels: Sequence[Level]) -> Table:
    table = Table("level", "branches", "killed", "blocks held", "without sharing", "saved", title="KV memory")
    for number, level in enumerate(levels, start=1):
        saved = f"{1 - level.num_blocks / level.num_copied:.0%}" if level.num_copied else "-"
        numbers = (number, level.num_nodes, level.num_killed, level.num_blocks, level.num_copied)
        table.add_row(*map(str, numbers), saved)
    return table


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompt", nargs="?", default=CODE)
    parser.add_argument("--chat", action="store_true", help="send the prompt through the model's chat template")
    parser.add_argument("--model", help="a directory or a hub name (default: the model in the package)")
    for name in ("width", "keep", "depth", "chunk", "max_tokens", "temperature", "seed"):
        default = getattr(Options(), name)
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default)
    args = vars(parser.parse_args(argv))
    prompt, model, is_chat = args.pop("prompt"), args.pop("model"), args.pop("chat")
    engine = AsyncEngine(model or str(model_directory()))
    try:
        tokenizer = engine.engine.tokenizer
        if is_chat and tokenizer is not None:
            prompt = {"prompt_token_ids": tokenizer.encode_chat([{"role": "user", "content": prompt}])}
        result = asyncio.run(search(engine, prompt, Options(**args)))
        console = Console(highlight=False)
        console.print(draw(result.root))
        console.print(Text(answer_of(engine, result.best).strip(), style="bold"))
        console.print(memory_table(result.levels))
    finally:
        engine.shutdown()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
