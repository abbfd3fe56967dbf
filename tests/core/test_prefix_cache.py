"""Names of blocks, and the search for a block that starts with most of some tokens."""

import hashlib
import random

import numpy as np
import pytest

from quire.core.prefix_cache import PrefixCache, chain_name, common_tokens, group_key, root_name


def raw(*tokens: int) -> bytes:
    return np.asarray(tokens, dtype="<i4").tobytes()


# -- names -------------------------------------------------------------------------------------------------------------
def test_parts_of_a_root_are_length_prefixed() -> None:
    assert root_name(("ab", "c")) != root_name(("a", "bc")) != root_name(("abc",))
    assert root_name(("a", None)) != root_name(("a", "None")) != root_name(("a",))
    assert root_name((1,)) != root_name(("1",))
    assert root_name((1, 23)) != root_name((12, 3))
    assert root_name(("model", 16, None)) == root_name(("model", 16, None))


def test_a_name_chains_its_parents_name_and_its_own_tokens() -> None:
    root = root_name(("model",))
    first = chain_name(root, raw(1, 2))
    assert first == hashlib.sha256(root + raw(1, 2)).digest()
    assert chain_name(first, raw(3, 4)) != chain_name(root, raw(3, 4)), "equal tokens after different ones"
    assert chain_name(root, raw(1, 2), b"image") != first


def test_names_of_cache_groups_differ() -> None:
    name = chain_name(b"", raw(1))
    assert group_key(0, name) != group_key(1, name)
    assert len(group_key(0, name)) == 2 + 32


# -- lookup ------------------------------------------------------------------------------------------------------------
def test_a_taken_name_is_not_given_again_and_a_removed_one_is() -> None:
    cache = PrefixCache()
    assert cache.add(7, b"name", b"parent", raw(1, 2))
    assert not cache.add(8, b"name", b"parent", raw(1, 2))
    assert (cache.get(b"name"), len(cache), list(cache.blocks())) == (7, 1, [7])
    assert cache.remove(7) == b"name"
    assert (cache.get(b"name"), len(cache)) == (None, 0)
    assert cache.longest_start(b"parent", raw(1)) is None
    assert cache.add(8, b"name", b"parent", raw(1, 2))


def test_nothing_of_a_removed_block_is_left() -> None:
    cache = PrefixCache()
    for block in range(1, 50):
        cache.add(block, bytes([block]), b"parent", raw(block % 7, block))
    for block in range(1, 50):
        cache.remove(block)
    assert not cache._block_of and not cache._entry_of and not cache._children


@pytest.mark.parametrize(
    ("a", "b", "common"),
    [
        ((), (), 0),
        ((1, 2, 3), (1, 2, 3), 3),
        ((1, 2, 3), (1, 2), 2),
        ((1, 2, 3), (1, 9, 3), 1),
        ((5, 2), (1, 2), 0),
        ((256,), (512,), 0),  # their first byte is equal: a byte is not a token
        ((7, 0x01020304), (7, 0x02020304), 1),  # and so are three of four
    ],
)
def test_common_tokens_counts_whole_tokens(a: tuple[int, ...], b: tuple[int, ...], common: int) -> None:
    assert common_tokens(raw(*a), raw(*b)) == common_tokens(raw(*b), raw(*a)) == common


def test_longest_start_finds_the_child_that_begins_alike() -> None:
    cache = PrefixCache()
    cache.add(1, b"a", b"parent", raw(1, 2, 3, 4))
    cache.add(2, b"b", b"parent", raw(1, 2, 9, 9))
    cache.add(3, b"c", b"other", raw(1, 2, 3, 9))
    assert cache.longest_start(b"parent", raw(1, 2, 3, 9)) == (1, 3)
    assert cache.longest_start(b"parent", raw(1, 2, 9)) == (2, 3)
    assert cache.longest_start(b"parent", raw(8, 2, 3, 4)) is None
    assert cache.longest_start(b"nobody", raw(1, 2, 3, 4)) is None


def test_longest_start_equals_a_search_through_all_children() -> None:
    """Token ids are spread so that byte order (little-endian) and the order of numbers differ."""
    rng = random.Random(3)
    alphabet = [0, 1, 2, 255, 256, 257, 65_536, 1 << 24, 2**31 - 1]
    for _ in range(300):
        cache, children = PrefixCache(), {}
        size = rng.randint(1, 5)
        few = rng.sample(alphabet, rng.randint(1, 4))
        for block in range(1, rng.randint(2, 40)):
            tokens = tuple(rng.choice(few) for _ in range(size))
            if cache.add(block, repr(tokens).encode(), b"parent", raw(*tokens)):
                children[block] = tokens
        for block in rng.sample(sorted(children), len(children) // 3):
            cache.remove(block)
            del children[block]
        for _ in range(10):
            wanted = tuple(rng.choice(few) for _ in range(rng.randint(1, size)))
            best = max((common_tokens(raw(*tokens), raw(*wanted)) for tokens in children.values()), default=0)
            found = cache.longest_start(b"parent", raw(*wanted))
            if not best:
                assert found is None
            else:
                assert found is not None and found[1] == best
                assert children[found[0]][:best] == wanted[:best]
