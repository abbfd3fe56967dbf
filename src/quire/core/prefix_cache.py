"""Which content is where: names of full blocks, and a search for the longest common start of a block.

A block's name chains its parent's name and its own token ids from a root that stands for everything else that decides
what its keys and values are (model revision, KV dtype, block size, adapter, salt), by SHA-256: two blocks have equal names
only if all tokens up to their end are equal, so a hit never has to be verified. The cache group is a prefix of the name.

Does not know reference counts or eviction order: `BlockPool` does.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator, Sequence


def root_name(parts: Sequence[str | int | None]) -> bytes:
    """The name from which a chain starts. Parts are length-prefixed, so ("ab", "c") and ("a", "bc") differ."""
    digest = hashlib.sha256()
    for part in parts:
        raw = repr(part).encode()
        digest.update(len(raw).to_bytes(8, "little") + raw)
    return digest.digest()


def chain_name(parent: bytes, tokens: bytes, extra: bytes = b"") -> bytes:
    """The name of a full block: `tokens` are its ids as little-endian int32, `extra` what else lies in it (images)."""
    return hashlib.sha256(parent + tokens + extra).digest()


def group_key(group: int, name: bytes) -> bytes:
    """A name in one cache group."""
    return group.to_bytes(2, "little") + name


def common_tokens(a: bytes, b: bytes) -> int:
    """How many int32 tokens two byte strings have in common at their start."""
    if a == b:
        return len(a) // 4
    size = min(len(a), len(b))
    low, high = 0, size  # a[:low] == b[:low]; a[:high] != b[:high] or high == size
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low // 4


class PrefixCache:
    """key -> block, and for each parent the sorted token strings of its children.

    In a sorted list the entry with the longest common start is a neighbour of the place where the sought string would be
    inserted, so a partial hit costs one bisection however many children a parent has.
    """

    def __init__(self) -> None:
        self._block_of: dict[bytes, int] = {}
        self._entry_of: dict[int, tuple[bytes, bytes, bytes]] = {}  # block -> key, parent, tokens
        self._children: dict[bytes, list[bytes]] = {}  # parent -> sorted tokens + block id (4 bytes)

    def __len__(self) -> int:
        return len(self._block_of)

    def blocks(self) -> Iterable[int]:
        return self._entry_of.keys()

    def get(self, key: bytes) -> int | None:
        return self._block_of.get(key)

    def key_of(self, block: int) -> bytes:
        return self._entry_of[block][0]

    def add(self, block: int, key: bytes, parent: bytes, tokens: bytes) -> bool:
        """False, and nothing changed, if the key is taken: the first block with a content stays its home."""
        if key in self._block_of:
            return False
        self._block_of[key] = block
        self._entry_of[block] = (key, parent, tokens)
        insort(self._children.setdefault(parent, []), tokens + block.to_bytes(4, "little"))
        return True

    def remove(self, block: int) -> bytes:
        key, parent, tokens = self._entry_of.pop(block)
        del self._block_of[key]
        children = self._children[parent]
        del children[bisect_left(children, tokens + block.to_bytes(4, "little"))]
        if not children:
            del self._children[parent]
        return key

    def longest_start(self, parent: bytes, tokens: bytes) -> tuple[int, int] | None:
        """(block, number of tokens) of the child of `parent` that starts with most of `tokens`; None if none does."""
        best: tuple[int, int] | None = None
        for entry in self._neighbours(parent, tokens):
            count = common_tokens(entry[:-4], tokens)
            if count and (best is None or count > best[1]):
                best = (int.from_bytes(entry[-4:], "little"), count)
        return best

    def next_tokens(self, parent: bytes, begins: bytes, at: int, most: int) -> list[int]:
        """The tokens at index `at` of up to `most` children of `parent` that begin with `begins`, `at` tokens; each once."""
        children = self._children.get(parent, [])
        found: list[int] = []
        index = bisect_left(children, begins)
        while index < len(children) and children[index].startswith(begins) and len(found) < most:
            token = int.from_bytes(children[index][4 * at : 4 * at + 4], "little")
            found.append(token)
            following = begins + children[index][4 * at : 4 * at + 4] + b"\xff" * len(children[index])
            index = bisect_left(children, following)
        return found

    def _neighbours(self, parent: bytes, tokens: bytes) -> Iterator[bytes]:
        children = self._children.get(parent)
        if children:
            at = bisect_left(children, tokens)
            if at < len(children):
                yield children[at]
            if at:
                yield children[at - 1]
