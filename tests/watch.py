"""What would wait on a device in a training step, seen on the meta device.

A tensor there has a shape and no numbers, so that whatever reads one back raises. What meta would
hide is refused by name: operators that are not torch's, inside which nobody looks, and numbers of
the host that an operator copies to the device, which on CUDA waits for all that was started before.
Numbers of Python become a tensor of the device, or an index into one, before an operator is called:
functions are watched for these.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

NAMESPACES = ('aten', 'profiler')  # an optimizer marks its step for a profiler
# pointwise operators pass a number of the host on to the device, but this one copies it
COPIES = {torch.ops.aten.where.self}
# an operator of ours, into which a test of its own looks
LOOKED_INTO = torch.ops.vqmoe_vision.mixed_integers.default
# what looks at its numbers inside on CUDA, by torch's source, and at none on meta
LOOKS = 'multinomial histc embedding_renorm_ _linalg_check_errors _linalg_eigh _linalg_svd'
LOOKS = {getattr(torch.ops.aten, name).default for name in LOOKS.split()}
RAISED = (AssertionError, NotImplementedError, RuntimeError)
# what makes a tensor of numbers, with the place of the numbers among its arguments
MAKERS: dict[Callable, int] = {torch.tensor: 0, torch.as_tensor: 0, torch.asarray: 0}
MAKERS |= {Tensor.new_tensor: 1, Tensor.new: 1}
INDEXING = (Tensor.__getitem__, Tensor.__setitem__)


class WatchPython(TorchFunctionMode):
    """Refuses numbers of Python that are copied to a device: meta has no copy of them."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        answer = func(*args, **(kwargs or {}))
        if func in MAKERS:
            given = tree_leaves((args[MAKERS[func] :], kwargs))
            copies = not any(isinstance(leaf, Tensor) for leaf in given)
            told = f'{func.__name__} copies from the host'
            assert answer.device.type == 'cpu' or not copies, told
        elif func in INDEXING:
            parts = args[1] if isinstance(args[1], tuple) else (args[1],)
            copies = any(isinstance(part, list | range) for part in parts)
            assert args[0].device.type == 'cpu' or not copies, f'{func.__name__} copies its index'
        return answer


class Watch(TorchDispatchMode):
    """Refuses what would wait on a device without raising on meta."""

    def __init__(self) -> None:
        super().__init__()
        self._python = WatchPython()

    def __enter__(self) -> 'Watch':
        self._python.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._python.__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func.namespace in NAMESPACES or func is LOOKED_INTO, f'{func} may read back inside'
        assert func not in LOOKS, f'{func} reads back inside'
        answer = func(*args, **(kwargs or {}))
        leaves = tree_leaves((args, kwargs, answer))
        devices = {leaf.device.type for leaf in leaves if isinstance(leaf, Tensor)}
        assert len(devices) < 2 or self.may_copy(func, kwargs or {}), f'{func} copies from the host'
        return answer

    def may_copy(self, func: Any, kwargs: dict[str, Any]) -> bool:
        """Whether an operator may see the host and the device."""
        return torch.Tag.pointwise in func.tags and func not in COPIES


@torch.library.custom_op('tests_watch::opaque', mutates_args=())
def opaque(x: Tensor) -> Tensor:
    """An operator inside which nobody looks."""
    return x * float(x.sum())


@opaque.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


READS: dict[str, Callable[[Tensor], Any]] = {
    'item': lambda x: x.sum().item(),
    'cpu': lambda x: x.cpu(),
    'mask': lambda x: x[x > 0],
    'nonzero': lambda x: x.nonzero(),
    'split': lambda x: x.split(x.long().flatten().tolist()),
    'opaque': lambda x: opaque(x),
    'number': lambda x: torch.where(x > 0, x, torch.tensor(0.0)),
    'copy': lambda x: torch.tensor([1.0]).to(x.device),
    'made of a list': lambda x: torch.tensor([1.0], device=x.device),
    'made of an array': lambda x: torch.asarray(np.ones(2), device=x.device),
    'made alike': lambda x: x.new_tensor([1.0]),
    'made as of old': lambda x: x.new([1.0]),
    'indexed by a range': lambda x: x[range(2)],
    'indexed by a list': lambda x: x[..., [0, 1]],
    'set by a list': lambda x: x.clone().__setitem__([0], x[:1]),
    'draw': lambda x: x.abs().flatten().multinomial(1),
    'histogram': lambda x: x.histc(3),
    'renorm': lambda x: F.embedding(x.flatten()[:1].long(), x.new_empty(3, 3), max_norm=1.0),
    'inverse': lambda x: torch.linalg.inv(x.new_empty(3, 3)),
    'singular values': lambda x: torch.linalg.svd(x.new_empty(3, 3)),
    'generator': lambda x: torch.rand(3, generator=torch.Generator()).to(x.device),
}
