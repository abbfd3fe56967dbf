"""Compiles Triton kernels for compute capability 9.0 on a machine without a GPU: `python compile_for_sm90.py`.

Launches are not run but compiled, with the arguments that they would have run with.
"""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"  # read when a kernel is defined

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

_TYPES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.int16: "*i16",
}
_OPTIONS = ("num_warps", "num_stages", "launch_pdl", "maxnreg")
compiled: dict[str, int] = {}
STACK_BYTES = {
    "_multiply_add": 0,
    "_linear": 0,
    "_heads_kernel": 0,
    "_linear_pieces": 0,
    "_linear_silu_mul": 56,
    "_attend": 0,
}
"""Of kernels all of whose values must stay in registers, or all but a few that are written once, at a tile's end."""


def compile_launch(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
    options = {name: kwargs.pop(name) for name in _OPTIONS if name in kwargs}
    bound = dict(zip(self.arg_names, args)) | kwargs
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(self.params):
        value = bound[parameter.name]
        if parameter.is_constexpr:
            signature[parameter.name] = "constexpr"
            constants[(i,)] = value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = _TYPES[value.dtype]
            attributes[(i,)] = [["tt.divisibility", 16]]
        elif hasattr(value, "layout"):  # a Gluon descriptor
            box = f"{_TYPES[value.base.dtype][1:]}{list(value.block_shape)}"
            signature[parameter.name] = f"tensordesc<{box},{value.layout!r}>"
        elif isinstance(value, TensorDescriptor):
            signature[parameter.name] = f"tensordesc<{_TYPES[value.base.dtype][1:]}{list(value.block_shape)}>"
        elif isinstance(value, int):
            signature[parameter.name] = "i32"
            if value % 16 == 0 and not parameter.do_not_specialize:
                attributes[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[parameter.name] = "fp32"
    make = GluonASTSource if self.is_gluon() else ASTSource
    source = make(fn=self, signature=signature, constexprs=constants, attrs=attributes)
    kernel = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    assert kernel.asm["cubin"]
    if self.__name__ in STACK_BYTES:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(kernel.asm["cubin"])
            file.flush()
            tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
            used = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
        stack = sum(int(count) for count in re.findall(r"(?:STACK|LOCAL):(\d+)", used))
        assert stack <= STACK_BYTES[self.__name__], f"{self.__name__} spills: {constants} {used}"
    assert kernel.metadata.shared <= 227 * 1024, f"{self.__name__} takes too much shared memory: {constants}"
    name = f"{self.__name__}({' '.join(signature.values())})"
    compiled[name] = kernel.metadata.shared


def main() -> None:
    JITFunction.run = compile_launch  # type: ignore[method-assign]
    sys.path += [str(Path(__file__).parent.parent), str(Path(__file__).parent.parent / "attention")]
    import test_linear
    import test_skinny
    import test_triton

    from quire.kernels import gluon
    from quire.kernels.triton import dependent

    dependent.options = lambda device: {"PDL": True, "launch_pdl": True}
    test_triton.launch_everything()
    test_skinny.launch_everything()
    test_linear.launch_everything()
    if triton.__version__.startswith(gluon.TRITON_VERSIONS):
        import test_gluon_decode
        import test_gluon_linear

        test_gluon_linear.launch_everything()
        test_gluon_decode.launch_everything()
    print(f"{len(compiled)} kernels compiled", *compiled, sep="\n  ")


if __name__ == "__main__":
    main()
