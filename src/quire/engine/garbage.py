"""Python's collector of garbage, beside a GPU that waits for its next step."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def short_collections() -> Iterator[None]:
    """Within, no collection walks through what is there now: libraries and a model are some 200,000 objects, and a walk through
    all of them takes a tenth of a second. Only what is made since is looked at.

    Afterwards all is looked at again, even what somebody else had frozen. Processes that only serve freeze it for good.
    """
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
