"""Linear layers of all experts on rows that stand together by expert, and who computes them.

Dispatch, experts and methods know plans and `grouped_linear` alone.
"""

from .choice import KERNELS, compute_dtype, grouped_linear, make_plan, refuse_named, use_kernel
from .plan import Plan, sorted_plan

__all__ = [
    'KERNELS',
    'Plan',
    'compute_dtype',
    'grouped_linear',
    'make_plan',
    'refuse_named',
    'sorted_plan',
    'use_kernel',
]
