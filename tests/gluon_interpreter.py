"""Runs kernels written in Gluon on a CPU: barriers, the copy engine and the matrix units as they are documented, and each part
of the warps in a thread of its own.

What a machine may do late is done as late as it may be: products read shared memory when they are waited for. Either copies
into it happen at once, and products take long; or copies happen some time later, in any order. So results are wrong where a
stage is filled too early or read too late, waits that nobody ends raise, and so do accesses beyond an allocation. Linear
layouts of shared memory are followed; others, and those of registers, say where elements lie, and do not matter here. What
the compiler makes of the text is not seen.
"""

from __future__ import annotations

import inspect
import random
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any, Literal

import pytest
import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonJITFunction
from triton.experimental.gluon.language._core import constexpr

DEADLOCK_S = 10.0
PRODUCTS_S = 0.01
"""They take, where they are late: longer than copies."""


def plain(value: Any) -> Any:
    return value.value if isinstance(value, constexpr) else value


class Values(Tensor):
    """In registers: their layout is nobody's concern here."""

    type = SimpleNamespace(layout=None)  # type: ignore[assignment]


class Memory:
    """A part of shared memory, row by row, but in columns of 64 where rows are longer, as the matrix units read them; or as a
    linear layout says. Boxes are kept as if they were not swizzled, so a layout's offsets are turned back."""

    def __init__(
        self, flat: Tensor, start: int, shape: list[int], is_transposed: bool = False, linear: Any = None
    ) -> None:
        self.flat, self.start, self.shape, self.is_transposed = flat, start, [plain(n) for n in shape], is_transposed
        self.linear = linear
        self.dtype = flat.dtype
        self.size = torch.Size(self.shape).numel()

    def index(self, i: Any) -> Memory:
        i = int(plain(i))
        assert 0 <= i < self.shape[0], f"{i} of {self.shape[0]}"
        each = self.size // self.shape[0]
        return Memory(self.flat, self.start + i * each, self.shape[1:], linear=self.linear)

    def _reinterpret(self, dtype: torch.dtype, shape: list[int], layout: Any) -> Memory:
        assert dtype is self.dtype
        linear = layout if isinstance(layout, gl.SharedLinearLayout) else None
        found = Memory(self.flat, self.start, shape, linear=linear)
        assert found.start + found.size <= len(self.flat), "beyond the allocation"
        return found

    def permute(self, order: list[int]) -> Memory:
        assert order == [1, 0]
        return Memory(self.flat, self.start, self.shape, not self.is_transposed, self.linear)

    def load(self, layout: Any = None) -> Tensor:
        found = self.flat[self.start : self.start + self.size].clone()
        if self.linear is not None:
            found = found[_places(self.linear, self.shape)]
        elif len(self.shape) == 2 and self.shape[1] > 64:
            found = found.view(-1, self.shape[0], 64).transpose(0, 1)
        found = found.reshape(self.shape)
        return found.t() if self.is_transposed else found

    def store(self, values: Tensor) -> None:
        self.flat[self.start : self.start + self.size] = values.reshape(-1)


def _places(layout: Any, shape: list[int]) -> Tensor:
    """Of the elements of a tile, row by row: where each lies, in rows of 64 that are not swizzled."""
    offset = torch.arange(torch.Size(shape).numel())
    at = [torch.zeros_like(offset) for _ in shape]
    for bit, basis in enumerate(layout.offset_bases):
        for axis, step in enumerate(basis):
            at[axis] ^= (offset >> bit & 1) * step
    element, places = at[0] * shape[1] + at[1], torch.empty_like(offset)
    places[element] = offset ^ (offset >> 6 & 7) << 3
    assert len(layout.offset_bases) == len(offset).bit_length() - 1 and len(set(element.tolist())) == len(element)
    return places


@dataclass
class Barrier:
    """An mbarrier: its phase ends when all arrivals and all bytes that were announced have come."""

    count: int = 0
    arrivals: int = 0
    missing_bytes: int = 0
    phase: int = 0

    def settle(self) -> None:
        assert self.arrivals <= self.count
        if self.arrivals == self.count and self.missing_bytes == 0:
            self.arrivals = 0
            self.phase += 1


@dataclass
class Pointer:
    flat: Tensor
    offset: Any = 0

    @property
    def dtype(self) -> Any:
        return SimpleNamespace(element_ty=self.flat.dtype)

    def __add__(self, other: Any) -> Pointer:
        return Pointer(self.flat, self.offset + plain(other))


@dataclass
class Descriptor:
    """A tensor map: boxes of it are copied, and what lies beyond an edge are zeros."""

    base: Tensor
    shape: list[int]
    strides: list[int]
    block_shape: list[int]
    layout: Any = None

    @property
    def dtype(self) -> torch.dtype:
        return self.base.dtype

    def box(self, at: list[int]) -> Tensor:
        places = [torch.arange(first, first + n) for first, n in zip(at, self.block_shape)]
        inside = [(place >= 0) & (place < n) for place, n in zip(places, self.shape)]
        offset, valid = torch.zeros((), dtype=torch.int64), torch.ones((), dtype=torch.bool)
        for i, (place, stride) in enumerate(zip(places, self.strides)):
            view = [-1 if j == i else 1 for j in range(len(places))]
            offset = offset + (place * stride).view(view)
            valid = valid & inside[i].view(view)
        flat = self.base.as_strided((int(offset[valid].max()) + 1 if valid.any() else 1,), (1,))
        return torch.where(valid, flat[torch.where(valid, offset, 0)], torch.zeros((), dtype=self.dtype))


@dataclass
class Machine:
    """What the parts of one program share."""

    program: int
    num_programs: int
    late: random.Random | None
    changed: threading.Condition = field(default_factory=threading.Condition)
    copies: list[Callable[[], None]] = field(default_factory=list)
    named: dict[str, list[int]] = field(default_factory=dict)  # barriers by their numbers: warps that have come, times
    failure: BaseException | None = None

    def wait_until(self, holds: Callable[[], bool]) -> None:
        with self.changed:
            while not holds():
                if self.failure is not None:
                    raise RuntimeError("another part of the program has failed")
                if self.copies:
                    self._copy_one()
                elif not self.changed.wait(DEADLOCK_S):
                    raise TimeoutError("a wait that nobody ends")

    def submit(self, copy: Callable[[], None]) -> None:
        with self.changed:
            self.copies.append(copy)
            while self.copies and (self.late is None or self.late.random() < 0.5):
                self._copy_one()
            self.changed.notify_all()

    def bar(self, how: str, number: str, num_threads: int) -> None:
        """bar.sync or bar.arrive by a part, which is four warps."""
        with self.changed:
            barrier = self.named.setdefault(number, [0, 0])
            barrier[0] += 128
            times = barrier[1]
            if barrier[0] == num_threads:
                barrier[:] = 0, times + 1
            self.changed.notify_all()
        if how == "sync":
            self.wait_until(lambda: barrier[1] > times)

    def _copy_one(self) -> None:
        self.copies.pop(self.late.randrange(len(self.copies)) if self.late else 0)()
        self.changed.notify_all()


class FakeLanguage:
    """In the place of `gl`. Scalars from memory are tensors without dimensions."""

    bfloat16, float16, float32, int32, int64 = torch.bfloat16, torch.float16, torch.float32, torch.int32, torch.int64
    exp2, log2 = staticmethod(torch.exp2), staticmethod(torch.log2)
    SliceLayout = staticmethod(lambda dim, parent: None)
    constexpr = staticmethod(lambda value: value)

    def __init__(self) -> None:
        self.machine = Machine(0, 1, None)
        self._memory = threading.Lock()

    def __getattr__(self, name: str) -> Any:
        return getattr(gl, name)  # layouts, above all

    def program_id(self, axis: int) -> int:
        return self.machine.program

    def num_programs(self, axis: int) -> int:
        return self.machine.num_programs

    @staticmethod
    def static_range(*bounds: Any) -> range:
        return range(*(int(plain(bound)) for bound in bounds))

    @staticmethod
    def arange(start: int, end: int, layout: Any = None) -> Tensor:
        return torch.arange(plain(start), plain(end)).as_subclass(Values)

    @staticmethod
    def full(shape: list[int], value: Any, dtype: torch.dtype, layout: Any = None) -> Tensor:
        return torch.full([plain(n) for n in shape], plain(value), dtype=dtype).as_subclass(Values)

    @classmethod
    def zeros(cls, shape: list[int], dtype: torch.dtype, layout: Any = None) -> Tensor:
        return cls.full(shape, 0, dtype)

    @staticmethod
    def minimum(x: Any, y: Any) -> Any:
        return torch.minimum(*_tensors(x, y))

    @staticmethod
    def maximum(x: Any, y: Any) -> Any:
        return torch.maximum(*_tensors(x, y))

    @staticmethod
    def where(condition: Any, x: Any, y: Any) -> Any:
        return torch.where(torch.as_tensor(condition), *_tensors(x, y))

    @staticmethod
    def max(x: Tensor, axis: int) -> Tensor:
        return x.amax(axis)

    @staticmethod
    def sum(x: Tensor, axis: int) -> Tensor:
        return x.sum(axis)

    @staticmethod
    def split(x: Tensor) -> tuple[Tensor, Tensor]:
        return x[..., 0], x[..., 1]

    @staticmethod
    def convert_layout(x: Tensor, layout: Any, assert_trivial: bool = False) -> Tensor:
        return x

    @staticmethod
    def load(pointer: Pointer, mask: Any = True, other: Any = 0, cache_modifier: str = "") -> Tensor:
        offset, mask = torch.broadcast_tensors(torch.as_tensor(pointer.offset), torch.as_tensor(mask))
        assert not mask.any() or (offset[mask].min() >= 0 and offset[mask].max() < len(pointer.flat))
        found = torch.where(mask, pointer.flat[torch.where(mask, offset, 0)], other)
        return found if found.is_floating_point() else found.long()

    @staticmethod
    def store(pointer: Pointer, values: Any, mask: Any = True) -> None:
        offset, values, mask = torch.broadcast_tensors(*map(torch.as_tensor, (pointer.offset, values, mask)))
        assert not mask.any() or (offset[mask].min() >= 0 and offset[mask].max() < len(pointer.flat))
        pointer.flat[offset[mask]] = values[mask].to(pointer.flat.dtype)

    def atomic_add(self, pointer: Pointer, value: int, sem: str) -> Tensor:
        with self._memory:
            before = self.load(pointer)
            self.store(pointer, before + value)
        return before

    def allocate_shared_memory(self, dtype: Any, shape: list[int], layout: Any) -> Any:
        shape = [int(plain(n)) for n in shape]
        if dtype is torch.int64:
            return Barriers([Barrier() for _ in range(shape[0])])
        nothing = float("nan") if dtype.is_floating_point else -1
        return Memory(torch.full((torch.Size(shape).numel(),), nothing, dtype=dtype), 0, shape)

    def asm(self, code: str) -> None:
        """Named barriers; what is said to dependent launches is nothing here."""
        found = re.match(r"bar\.(sync|arrive) (\d+), (\d+);", code)
        if found:
            self.machine.bar(found[1], found[2], int(found[3]))
        else:
            assert code.startswith("griddepcontrol."), code

    def thread_barrier(self) -> None:
        """A part's warps are one thread here."""

    def warp_specialize(self, parts: list[Any], warps: list[int], registers: list[int]) -> None:
        machine = self.machine

        def run(function: Callable[..., None], args: tuple[Any, ...]) -> None:
            try:
                function(*args)
            except BaseException as error:
                with machine.changed:
                    machine.failure = machine.failure or error
                    machine.changed.notify_all()

        threads = [threading.Thread(target=run, args=part) for part in parts]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if machine.failure is not None:
            raise machine.failure


@dataclass
class Barriers:
    all: list[Barrier]

    def index(self, i: Any) -> Barrier:
        return self.all[int(plain(i))]


class FakeBarriers:
    """In the place of `mbarrier`."""

    MBarrierLayout = staticmethod(lambda: None)

    def __init__(self, language: FakeLanguage) -> None:
        self._language = language

    def init(self, barrier: Barrier, count: int) -> None:
        barrier.count = int(plain(count))

    def _change(self, barrier: Barrier, arrivals: int = 0, missing_bytes: int = 0) -> None:
        with self._language.machine.changed:
            barrier.arrivals += arrivals
            barrier.missing_bytes += missing_bytes
            barrier.settle()
            self._language.machine.changed.notify_all()

    def expect(self, barrier: Barrier, num_bytes: int, pred: Any = True) -> None:
        if pred:
            self._change(barrier, 1, int(plain(num_bytes)))

    def arrive(self, barrier: Barrier, pred: bool = True) -> None:
        if pred:
            self._change(barrier, 1)

    def wait(self, barrier: Barrier, parity: Any) -> None:
        self._language.machine.wait_until(lambda: barrier.phase & 1 != plain(parity))


class FakeCopies:
    """In the place of `tma`."""

    def __init__(self, language: FakeLanguage, barriers: FakeBarriers) -> None:
        self._language, self._barriers = language, barriers

    def async_copy_global_to_shared(
        self, descriptor: Descriptor, at: list[Any], barrier: Barrier, target: Memory, pred: Any = True
    ) -> None:
        if not pred:
            return
        values = descriptor.box([int(plain(i)) for i in at])
        assert list(values.shape) == target.shape

        def copy() -> None:
            target.store(values)
            barrier.missing_bytes -= values.numel() * values.element_size()
            barrier.settle()

        self._language.machine.submit(copy)


class Product:
    """Under way: it reads its operands when it is waited for."""

    def __init__(self, a: Memory | Tensor, b: Memory, acc: Tensor) -> None:
        self._operands = a, b
        self._acc = acc

    def end(self) -> Tensor:
        a, b = (x.load() if isinstance(x, Memory) else x for x in self._operands)
        return self._acc + a.float() @ b.float()


class Products(threading.local):
    """In the place of `warpgroup_mma` and `warpgroup_mma_wait`: each part's products under way, and what has ended."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self.under_way: list[Product] = []
        self.ended: dict[int, tuple[Product, Tensor]] = {}

    def begin(self, a: Memory | Tensor, b: Memory, acc: Any, is_async: bool, use_acc: bool = True) -> Product:
        assert is_async
        product = Product(a, b, self._value(acc) if use_acc else acc * 0)
        self.under_way.append(product)
        return product

    def _value(self, x: Any) -> Any:
        return self.ended[id(x)][1] if isinstance(x, Product) and id(x) in self.ended else x

    def wait(self, count: Any, given: Any) -> Any:
        time.sleep(self._seconds)
        while len(self.under_way) > plain(count):
            product = self.under_way.pop(0)
            if isinstance(product._acc, Product):  # of the turn before: those end in order
                product._acc = self.ended.pop(id(product._acc))[1]
            self.ended[id(product)] = product, product.end()
        found = tuple(self._value(x) for x in given)
        return found[0] if len(found) == 1 else found


def mma_v2(a: Tensor, b: Tensor, acc: Tensor) -> Tensor:
    return acc + a.float() @ b.float()


def _tensors(x: Any, y: Any) -> tuple[Tensor, Tensor]:
    """Two of one type: a Python number takes the other's."""
    x, y = plain(x), plain(y)
    like = next((value.dtype for value in (x, y) if isinstance(value, Tensor)), None)
    x, y = (value if isinstance(value, Tensor) else torch.tensor(value, dtype=like) for value in (x, y))
    return x, y


class Number(int):
    """A constant of the module, of which the host asks the value."""

    value = property(int)


class Function:
    """In the place of a function that is compiled: called by others, or launched as a kernel."""

    def __init__(self, function: GluonJITFunction, language: FakeLanguage, late: random.Random | None) -> None:
        self._text, self._language, self._late = function.fn, language, late
        self._parameters = list(inspect.signature(function.fn).parameters)

    def __call__(self, *args: Any) -> Any:
        return self._text(*args)

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*args: Any, **kwargs: Any) -> None:
            bound = dict(zip(self._parameters, args)) | {k: v for k, v in kwargs.items() if k in self._parameters}
            for name, value in bound.items():
                if isinstance(value, Tensor):
                    size = value.untyped_storage().nbytes() // value.element_size() - value.storage_offset()
                    bound[name] = Pointer(value.as_strided((size,), (1,)))
                elif hasattr(value, "block_shape"):
                    bound[name] = Descriptor(value.base, value.shape, value.strides, value.block_shape)
            for program in range(grid[0]):
                self._language.machine = Machine(program, grid[0], self._late)
                self._text(**bound)

        return launch


@contextmanager
def interpreted(module: ModuleType, late: Literal["copies", "products"]) -> Iterator[None]:
    """Within, launches of the module's kernels are interpreted."""
    language = FakeLanguage()
    barriers, products = FakeBarriers(language), Products(PRODUCTS_S if late == "products" else 0.0)
    when = random.Random(0) if late == "copies" else None
    fakes: dict[str, Any] = {
        "gl": language,
        "mbarrier": barriers,
        "tma": FakeCopies(language, barriers),
        "fence_async_shared": lambda: None,
        "warpgroup_mma": products.begin,
        "warpgroup_mma_wait": products.wait,
        "mma_v2": mma_v2,
        "asm": lambda code: language.asm(code),
        "narrow": lambda x, dtype: x.to(dtype),
        "reciprocal": lambda x: 1.0 / x,
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in list(vars(module).items()):
            if name in fakes:
                patch.setattr(module, name, fakes[name])
            elif isinstance(value, GluonJITFunction):
                patch.setattr(module, name, Function(value, language, when))
            elif isinstance(value, constexpr) and isinstance(value.value, int | float):
                patch.setattr(module, name, Number(value.value) if isinstance(value.value, int) else value.value)
        yield
