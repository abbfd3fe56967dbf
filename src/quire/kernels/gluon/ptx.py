"""Instructions that Gluon has no word for, or not the shortest one."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def asm(code: gl.constexpr):
    """code names $0, which is nothing, at least in a comment."""
    gl.inline_asm_elementwise(code, "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def narrow(x, dtype: gl.constexpr):
    """fp32 to bf16 or fp16, two elements at once, as they lie in one register; `to` would convert each, then shuffle bytes."""
    if dtype == gl.bfloat16:
        y = gl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,r,r", [x], dtype=gl.bfloat16, is_pure=True, pack=2
        )
    else:
        y = gl.inline_asm_elementwise(
            "cvt.rn.f16x2.f32 $0, $2, $1;", "=r,r,r", [x], dtype=gl.float16, is_pure=True, pack=2
        )
    return y


@gluon.jit
def reciprocal(x):
    """Within one part in 2^23, of fp32; a division takes many instructions."""
    return gl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)
