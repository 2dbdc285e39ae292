"""A plugin of pytest: Triton's interpreter multiplies bfloat16, which it holds as integers."""

import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder

multiply = InterpreterBuilder.create_dot


def create_dot(self, a, b, *rest):
    wide = [self.create_fp_ext(t, tl.float32) if t.dtype == tl.bfloat16 else t for t in (a, b)]
    return multiply(self, *wide, *rest)


InterpreterBuilder.create_dot = create_dot
