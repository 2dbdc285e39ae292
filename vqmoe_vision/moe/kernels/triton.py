"""Products of groups in Triton: the kernel of cards for which torch has none that does not wait.

That is CUDA from compute capability 8.0 on (A100, 4090, RTX 50) and ROCm (MI300), in bfloat16,
float16 and float32. A program computes a tile of answers of one expert. It finds which in the ends,
which stay on the device: how many tiles there are at most, ceil(R / tile) + E, the host knows.
Bias, its gradient, rows past the last end and experts without rows are part of the products.

Sums are float32. So are products of float32, unless `torch.backends.cuda.matmul` says 'tf32' (as
`torch.set_float32_matmul_precision('high')` lets it), on NVIDIA alone. Tiles are fixed, not tuned
on the card: a resumed run has to sum in the same order.

With TRITON_INTERPRET=1 it runs on CPUs, in Python: for tests.

Legend: R rows sorted by expert, E experts, N and K widths of answers and rows.
"""

import os
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

INTERPRETED = os.environ.get('TRITON_INTERPRET') == '1'
# torch 2.12 refuses what is interpreted
wrap_triton: Any = (lambda kernel: kernel) if INTERPRETED else torch.library.wrap_triton

# Of answers (ROWS, COLUMNS) and of the width that is summed over, by bytes of a number: at most
# 48 KiB of shared memory, which all cards have.
TILES = {
    2: dict(ROWS=128, COLUMNS=128, INNER=32, num_warps=4, num_stages=3),
    4: dict(ROWS=64, COLUMNS=64, INNER=32, num_warps=4, num_stages=3),
}


def builds_for(kind: str) -> bool:
    """Whether Triton runs on devices of a kind; raises where it wants for a compiler of C."""
    if kind == 'cpu' or INTERPRETED:
        return INTERPRETED
    return bool(triton.runtime.driver.active.get_current_target())


def compiles_for(device: torch.device) -> bool:
    """Whether it compiles for a device: for CUDA from 8.0 on."""
    if INTERPRETED or torch.version.hip is not None:
        return True
    return device.type == 'cuda' and torch.cuda.get_device_capability(device) >= (8, 0)


@triton.jit
def _group_of(tile, ends, num_rows, num_experts, ROWS: tl.constexpr, GROUPS: tl.constexpr):
    """Expert of a tile, its first row and where the group stops; E for rows past the last end."""
    group = tl.arange(0, GROUPS)  # a power of two above E
    stop = tl.load(ends + group, mask=group < num_experts, other=num_rows)
    start = tl.load(ends + group - 1, mask=(group > 0) & (group <= num_experts), other=0)
    tiles = tl.where(group <= num_experts, tl.cdiv(stop - start, ROWS), 0)
    tiles_up_to = tl.cumsum(tiles, 0)
    expert = tl.sum((tiles_up_to <= tile).to(tl.int32), 0)
    # none of these is it where a tile is one too many: nothing is left to compute
    here = group == expert
    first = tl.sum(tl.where(here, start + (tile - tiles_up_to + tiles) * ROWS, 0), 0)
    return expert, first, tl.sum(tl.where(here, stop, 0), 0)


@triton.jit
def product_kernel(
    x,  # (R, K)
    weight,  # (E, N, K), by strides
    bias,  # (E, N)
    out,  # (R, N)
    ends,  # (E,)
    num_rows,
    num_experts,
    n,
    k,
    stride_n,
    stride_k,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """One tile of `out`."""
    # tiles of the same rows are neighbours: they read rows once, and the weights of one expert
    across = tl.cdiv(n, COLUMNS)
    tile, column = tl.program_id(0) // across, tl.program_id(0) % across
    expert, first, stop = _group_of(tile, ends, num_rows, num_experts, ROWS, GROUPS)
    if first >= stop:
        return
    computes = expert < num_experts
    rows = tl.arange(0, ROWS)
    columns = column * COLUMNS + tl.arange(0, COLUMNS)
    inner = tl.arange(0, INNER)
    is_row, is_column = (rows < stop - first)[:, None], (columns < n)[None, :]
    # A batch has more than 2^31 numbers, and a tile has few: wide numbers of each fill registers.
    from_x = x + first.to(tl.int64) * k
    from_weight = weight + expert.to(tl.int64) * n * k
    in_x = rows[:, None] * k + inner[None, :]
    in_weight = columns[None, :] * stride_n + inner[:, None] * stride_k
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for i in range(0, tl.where(computes, k, 0), INNER):
        left = inner < k - i
        a = tl.load(from_x + in_x, mask=is_row & left[None, :], other=0.0)
        b = tl.load(from_weight + in_weight, mask=is_column & left[:, None], other=0.0)
        total = tl.dot(a, b, total, input_precision=PRECISION)
        from_x += INNER
        from_weight += INNER * stride_k
    if HAS_BIAS:
        own = columns < tl.where(computes, n, 0)
        total += tl.load(bias + expert * n + columns, mask=own, other=0.0).to(tl.float32)[None, :]
    to = out + first.to(tl.int64) * n + rows[:, None] * n + columns[None, :]
    tl.store(to, total.to(out.dtype.element_ty), mask=is_row & is_column)


@triton.jit
def weight_kernel(
    grad,  # (R, N)
    x,  # (R, K)
    grad_weight,  # (E, N, K)
    grad_bias,  # (E, N)
    ends,  # (E,)
    n,
    k,
    FOR_WEIGHT: tl.constexpr,
    FOR_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
):
    """One tile of `grad_weight`, or in the last column of tiles one of `grad_bias`."""
    across = tl.cdiv(k, COLUMNS) * FOR_WEIGHT + FOR_BIAS
    tile, column, expert = tl.program_id(0) // across, tl.program_id(0) % across, tl.program_id(1)
    first = tl.load(ends + expert - 1, mask=expert > 0, other=0)
    stop = tl.load(ends + expert)
    wide = tile * ROWS + tl.arange(0, ROWS)  # of N
    inner = tl.arange(0, INNER)  # rows, over which is summed
    is_wide = wide < n
    from_grad = grad + first.to(tl.int64) * n
    in_grad = inner[None, :] * n + wide[:, None]
    if FOR_BIAS and column == across - 1:
        summed = tl.zeros((ROWS,), tl.float32)
        for i in range(first, stop, INNER):
            mask = is_wide[:, None] & (inner < stop - i)[None, :]
            summed += tl.sum(tl.load(from_grad + in_grad, mask=mask, other=0.0).to(tl.float32), 1)
            from_grad += INNER * n
        tl.store(grad_bias + expert * n + wide, summed.to(grad.dtype.element_ty), mask=is_wide)
    elif FOR_WEIGHT:
        columns = column * COLUMNS + tl.arange(0, COLUMNS)  # of K
        is_column = (columns < k)[None, :]
        from_x = x + first.to(tl.int64) * k
        in_x = inner[:, None] * k + columns[None, :]
        total = tl.zeros((ROWS, COLUMNS), tl.float32)
        for i in range(first, stop, INNER):
            left = inner < stop - i
            a = tl.load(from_grad + in_grad, mask=is_wide[:, None] & left[None, :], other=0.0)
            b = tl.load(from_x + in_x, mask=left[:, None] & is_column, other=0.0)
            total = tl.dot(a, b, total, input_precision=PRECISION)
            from_grad += INNER * n
            from_x += INNER * k
        to = grad_weight + expert.to(tl.int64) * n * k + wide[:, None] * k + columns[None, :]
        tl.store(to, total.to(grad.dtype.element_ty), mask=is_wide[:, None] & is_column)


def _launch(
    kernel: Any, grid: tuple[int, ...], tensors: tuple[Tensor, ...], *args: Any, **options: Any
) -> None:
    # on the card of the tensors: Triton takes the current one
    with torch.cuda.device_of(tensors[0]):
        wrap_triton(kernel)[grid](*tensors, *args, **options)


def _options(x: Tensor) -> dict[str, Any]:
    fast = torch.backends.cuda.matmul.fp32_precision == 'tf32' and torch.version.hip is None
    precision = 'tf32' if fast and x.dtype == torch.float32 else 'ieee'
    return TILES[x.element_size()] | {'PRECISION': precision}


def _launch_product(
    x: Tensor, weight: Tensor, bias: Tensor | None, ends: Tensor, turned: bool = False
) -> Tensor:
    """Rows (R, K) by weight (E, N, K), or by (E, K, N) if it is `turned`."""
    (num_rows, k), num_experts, told = x.shape, weight.shape[0], _options(x)
    n = weight.shape[2 if turned else 1]
    out = x.new_empty(num_rows, n)
    num_tiles = triton.cdiv(num_rows, told['ROWS']) + num_experts
    tensors = x, weight, x if bias is None else bias, out, ends
    strides = (1, n) if turned else (k, 1)
    told |= {'HAS_BIAS': bias is not None, 'GROUPS': triton.next_power_of_2(num_experts + 1)}
    grid = (num_tiles * triton.cdiv(n, told['COLUMNS']),)
    _launch(product_kernel, grid, tensors, num_rows, num_experts, n, k, *strides, **told)
    return out


@torch.library.triton_op('vqmoe_vision::tiled_product', mutates_args=())
def product(x: Tensor, weight: Tensor, bias: Tensor | None, ends: Tensor) -> Tensor:
    """As that of `Kernel`."""
    return _launch_product(x, weight, bias, ends)


@torch.library.triton_op('vqmoe_vision::tiled_gradients', mutates_args=())
def gradients(
    grad: Tensor, x: Tensor, weight: Tensor, ends: Tensor, wanted: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """As those of `Kernel`; of frozen ones an empty tensor."""
    num_experts, n, k = weight.shape
    grad_x = _launch_product(grad, weight, None, ends, turned=True) if wanted[0] else x.new_empty(0)
    grad_weight = torch.empty_like(weight) if wanted[1] else x.new_empty(0)
    grad_bias = x.new_empty(num_experts, n) if wanted[2] else x.new_empty(0)
    if wanted[1] or wanted[2]:
        told = _options(x) | {'FOR_WEIGHT': wanted[1], 'FOR_BIAS': wanted[2]}
        across = triton.cdiv(k, told['COLUMNS']) * wanted[1] + wanted[2]
        grid = (triton.cdiv(n, told['ROWS']) * across, num_experts)
        _launch(weight_kernel, grid, (grad, x, grad_weight, grad_bias, ends), n, k, **told)
    return grad_x, grad_weight, grad_bias


@register_flop_formula(torch.ops.vqmoe_vision.tiled_product)
def _flops(x: torch.Size, weight: torch.Size, *_: Any, **__: Any) -> int:
    return 2 * x[0] * weight[1] * weight[2]


@register_flop_formula(torch.ops.vqmoe_vision.tiled_gradients)
def _gradient_flops(
    grad: torch.Size, x: torch.Size, weight: torch.Size, _: Any, wanted: list[bool], **__: Any
) -> int:
    return 2 * x[0] * weight[1] * weight[2] * sum(wanted[:2])
