"""Optimizers that look at a tensor as a whole, and experts that are stacked in one.

AdamW and its like work element by element: (E, out, in) is no different from E matrices. Others
would let experts share what each matrix of a dense model has for itself: LAMB and LARS one norm,
Muon one orthogonal factor, Shampoo and SOAP correlations along every dimension, 'cautious' variants
one mean. `collect_losses` refuses them, unless `per_expert` has taught them the experts.

Legend: E experts.
"""

from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from .config import check

# Class names in timm, torch, apex, torch_optimizer and SOAP's repository, in small letters. The
# tests hold every optimizer that timm lists against E separate matrices. apex's LARC is none: it
# scales gradients before another optimizer steps, which nothing here sees.
_WHOLE_TENSOR = {
    'adafactor', 'adafactorbigvision', 'adamp', 'fusedlamb', 'fusednovograd', 'kron', 'lamb',
    'lars', 'mars', 'muon', 'novograd', 'nvnovograd', 'sgdp', 'shampoo', 'soap',
}  # fmt: skip


def mixes_experts(optimizer: Optimizer) -> bool:
    """Whether an optimizer would update the experts of a stacked weight as one tensor."""
    cautious = any(group.get('caution') for group in optimizer.param_groups)
    names = {kind.__name__.lower() for kind in type(optimizer).__mro__}
    return cautious or not names.isdisjoint(_WHOLE_TENSOR)


def per_expert(optimizer: Optimizer, model: nn.Module) -> Optimizer:
    """Let an optimizer update each expert as it would the same matrix alone; returns it.

    While it steps, saves or loads, a stacked parameter is replaced by views of its experts.
    Otherwise groups hold the model's parameters, for schedulers, clipping and gradient scalers.

    Args:
        optimizer: Any over parameters of `model` but timm's `Lookahead`, changed in place. Teach
            it before its state is loaded, and a copy of it anew.
        model: Holds the experts.
    """
    _refuse_lookahead(optimizer)
    views = _ExpertViews(_untaught(optimizer, model))
    if views.views:
        optimizer.register_step_pre_hook(views.before_step)
        optimizer.register_step_post_hook(views.join)
        optimizer.register_state_dict_pre_hook(views.split)
        optimizer.register_state_dict_post_hook(views.join)
        optimizer.register_load_state_dict_pre_hook(views.split)
        optimizer.register_load_state_dict_post_hook(views.join)
    return optimizer


def check_optimizer(optimizer: Optimizer, model: nn.Module) -> None:
    """Refuse an optimizer that would mix the experts of a model."""
    if not mixes_experts(getattr(optimizer, '_base_optimizer', optimizer)):
        return
    _refuse_lookahead(optimizer)
    stacked = {*_untaught(optimizer, model)}
    if any(p in stacked for group in optimizer.param_groups for p in group['params']):
        raise ValueError(
            f'optimizer={type(optimizer).__name__} is not possible as it is: it would update all '
            'experts of a layer as one tensor; call vqmoe_vision.per_expert(optimizer, model) '
            'once, or take one that works element by element, such as AdamW'
        )


def _refuse_lookahead(optimizer: Optimizer) -> None:
    # it keeps a copy of each whole parameter in the state of what is inside of it
    kind, allowed = type(optimizer).__name__, 'what it wraps alone, or one that works by element'
    check(not hasattr(optimizer, '_base_optimizer'), 'optimizer', kind, allowed)


def _untaught(inner: Optimizer, model: nn.Module) -> list[nn.Parameter]:
    """Parameters that have the experts as their first dimension, without those with views."""
    views = [getattr(hook, '__self__', None) for hook in inner._optimizer_step_pre_hooks.values()]
    taught = {p for each in views if isinstance(each, _ExpertViews) for p in each.views}
    modules = (m for m in model.modules() if getattr(m, 'stacks_experts', False))
    found = (p for module in modules for p in module.parameters(recurse=False))
    return [p for p in found if p not in taught]


class _ExpertViews:
    """Exchanges stacked parameters and views of their experts in parameter groups."""

    def __init__(self, stacked: list[nn.Parameter]) -> None:
        self.views: dict[Tensor, list[Tensor]] = {p: list(p.detach().unbind()) for p in stacked}
        self.owners = {views[0]: p for p, views in self.views.items()}
        self.others = {view for views in self.views.values() for view in views[1:]}

    def before_step(self, optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
        """Split, but not for a closure, whose gradients would be those of whole parameters."""
        closure = [*args[1:], kwargs.get('closure')][0]  # the optimizer itself comes first
        check(closure is None, 'closure', closure, 'None: call it before the step')
        self.split(optimizer)

    def split(self, optimizer: Optimizer, *_: Any) -> None:
        for group in optimizer.param_groups:
            group['params'] = [part for p in group['params'] for part in self._parts(p)]

    def join(self, optimizer: Optimizer, *_: Any) -> None:
        for group in optimizer.param_groups:
            group['params'] = [
                self.owners.get(p, p) for p in group['params'] if p not in self.others
            ]
        for views in self.views.values():
            for view in views:
                view.grad = None  # or it would keep the gradient of the whole parameter alive

    def _parts(self, parameter: Tensor) -> list[Tensor]:
        if parameter not in self.views:
            return [parameter]
        views = self.views[parameter]
        # again at each step: a model that was moved or cast has other memory behind its parameters
        for i, view in enumerate(views):
            view.data = parameter.detach()[i]
            view.grad = None if parameter.grad is None else parameter.grad[i]
        return views
