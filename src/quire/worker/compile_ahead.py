"""Triton kernels compiled by many threads at once, before they are launched one by one.

A launch compiles its kernel if the cache on disk has none: a fifth of a second to two, and the first start of a model has some
forty. Most of that time is spent outside Python's lock. Knows Triton's launches, not what is launched.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager


@contextmanager
def compiling_ahead(num_threads: int) -> Iterator[None]:
    """Within, launching a Triton kernel runs nothing, and only asks for its compilation; on leaving, all are compiled.

    What does not compile raises when it is launched. In Triton's interpreter, and where Triton compiles in one thread alone
    (before 3.4), launches are launches.
    """
    try:
        from triton import AsyncCompileMode
        from triton.runtime.jit import JITFunction
    except ImportError:
        yield
        return
    run = JITFunction.run

    def compile_only(self, *args, **kwargs):  # type: ignore[no-untyped-def]
        return run(self, *args, **(kwargs | {"warmup": True}))

    threads = ThreadPoolExecutor(num_threads)
    JITFunction.run = compile_only
    try:
        with AsyncCompileMode(threads, ignore_errors=True):
            yield
    finally:
        JITFunction.run = run
        threads.shutdown()
