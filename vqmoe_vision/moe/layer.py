"""Mixture-of-experts layers: what every one of them owes, and the one that routes by a `Router`.

Legend: B images, N tokens per image, T = B * N, D width, E experts.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from .codebook import Quantized
from .dispatch import run_experts
from .experts import Experts
from .joint_losses import Loss
from .losses import token_mean
from .routing import Router, Routing, expert_load
from .scripting import StaysPython

# What a pass decided for every token, by name; a module that decided has the name it has in the
# layer. Then come the tokens (B, N, D) that the layer was given, and its answer.
Decisions = dict[str, Routing | Quantized | Tensor]
Watcher = Callable[[Decisions, Tensor, Tensor], None]

_UNCOLLECTED = (
    'training without collect_losses(model): auxiliary losses are not part of the loss and '
    'codebooks do not learn'
)
_already_warned = False


def in_recomputation() -> bool:
    """Whether autograd's backward is running, as when gradient checkpointing repeats a layer."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


class Recorder:
    """Keeps what a layer reports while a `collect_losses` block is open.

    Copies and pickles of a model start closed, empty and unwatched.

    Attributes:
        watcher: Who looks at what is decided for every token; nobody, as a rule.
    """

    def __init__(self) -> None:
        self.active = False
        self.losses: list[tuple[str, Loss, int]] = []  # the last is the number of tokens
        self.stats: list[tuple[str, Tensor]] = []
        self.watcher: Watcher | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {'active': False, 'losses': [], 'stats': [], 'watcher': None}

    def start(self) -> None:
        """Begin to keep."""
        self.active = True

    def stop(self) -> None:
        """Stop keeping, and forget."""
        self.active, self.losses, self.stats = False, [], []


class MoeLayer(StaysPython):
    """Base of every mixture-of-experts layer: tensor in, tensor of the same shape out.

    A subclass implements `run` ((B, N, D) -> (B, N, D), no buffer changes). In it, it calls
    `record` once, if it has losses or statistics, and `show`. The other methods are there for
    layers that need them.

    Attributes:
        needs_collecting: Whether the layer has losses, or state that learns without gradients.
        permutation_equivariant: Whether a permutation of the tokens permutes the answer. False is
            for methods that route by position.
        routing_learns: Whether the experts of a token change while the model learns.
        experts: The experts.
    """

    needs_collecting = True
    permutation_equivariant = True
    routing_learns = True
    experts: Experts
    # TorchScript would compile properties
    __jit_unused_properties__: ClassVar[list[str]] = [
        *StaysPython.__jit_unused_properties__,
        'experts_per_token',
        'listens',
    ]

    def __init__(self) -> None:
        super().__init__()
        self.recorder = Recorder()
        self._updated = False
        self._ran_without_grad = False

    @property
    def experts_per_token(self) -> float:
        """Experts that compute for a token, on average."""
        raise NotImplementedError

    def idle_params(self) -> int:
        """Parameters of the experts that a token does not use, on average."""
        idle = max(self.experts.num_experts - self.experts_per_token, 0)
        return round(idle * self.experts.params_per_expert())

    def record(
        self, losses: Mapping[str, Loss], stats: Mapping[str, Tensor], num_tokens: int
    ) -> None:
        """Report what a pass gave; kept only by an open block of `collect_losses`.

        Args:
            losses: Weighted losses by name: means over tokens, 0-dim float32, or balance losses.
            stats: Detached statistics by name: scalars, or shares (E,) that sum to 1.
            num_tokens: Tokens of the pass, by which losses count where processes share a batch.

        """
        if self.listens:
            self.recorder.losses.extend((n, loss, num_tokens) for n, loss in losses.items())
            self.recorder.stats.extend(stats.items())

    def show(self, decisions: Decisions, inputs: Tensor, outputs: Tensor) -> None:
        """Let whoever watches see what a pass decided; nothing is kept or computed for it here.

        Args:
            decisions: By name: the routing of a router or the answer of a codebook, under the name
                of that module in this layer; or a tensor that begins with (B, N), or (T,).
            inputs: What the layer was given, (B, N, D).
            outputs: Its answer, (B, N, D).
        """
        if self.recorder.watcher is not None and not in_recomputation():
            self.recorder.watcher(decisions, inputs, outputs)

    @property
    def listens(self) -> bool:
        """Whether somebody keeps what is recorded now, so that statistics are worth computing."""
        return self.recorder.active and not in_recomputation()

    def begin(self) -> None:
        """Get ready for the passes of a block, which opens now."""
        self._updated = self.apply_begin() or self._updated

    def apply_begin(self) -> bool:
        """Change state that is due before the next pass; returns whether it may have changed."""
        return False

    def update(self) -> None:
        """Apply what the last block collected for the state of this layer."""
        # an update with nothing to learn does not undo the one before
        self._updated = self.apply_update() or self._updated

    def apply_update(self) -> bool:
        """Change state that learns without gradients; returns whether it may have changed.

        What the device alone knows is not waited for: it may have.
        """
        return False

    def moves_state(self) -> bool:
        """Whether there is state that `update` has to move while the layer trains."""
        return type(self).apply_update is not MoeLayer.apply_update

    def discard(self) -> None:
        """Forget what the next update would learn from, as the block ended in an error."""

    def start_training(self, num_updates: int) -> None:
        """Hear how many updates a training will have, before it starts."""

    def restart(self) -> str | None:
        """Begin a new training from the weights as they are; returns what changed, in words."""
        return None

    def check_discrete(self) -> None:
        """Refuse `to_discrete` where it is not possible.

        Raises:
            ValueError: The layer has no discrete branch.
        """
        raise ValueError(f'{type(self).__name__} has no discrete branch to keep')

    def to_discrete(self) -> dict[str, Any]:
        """Keep the discrete branch alone.

        Returns:
            The options in which the layer is now another one; empty if it was discrete already.

        Raises:
            ValueError: As `check_discrete`.
        """
        self.check_discrete()
        return {}

    def fit_state(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Make the state of a layer of this method, but of other sizes or form, fit this one.

        Args:
            state: Names relative to the layer.

        Returns:
            What fits is changed, what is of no use here left out; the rest stays as it is.
        """
        omitted = self.omitted(state)
        return {name: value for name, value in state.items() if name not in omitted}

    def omitted(self, names: Iterable[str]) -> set[str]:
        """Names of the state of another form of this layer that it does without.

        Every loading leaves them out, strict ones too.

        Args:
            names: Of the state, relative to the layer.
        """
        return set()

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        # the one place that torch's, timm's and mmengine's loading have in common
        names = [name[len(prefix) :] for name in state_dict if name.startswith(prefix)]
        for name in self.omitted(names):
            del state_dict[prefix + name]
        super()._load_from_state_dict(state_dict, prefix, *args)

    def before_run(self) -> None:
        """Refuse to repeat a pass that would not be the same.

        Before it, not in `record`: checkpointing stops to repeat a block as soon as it has what the
        backward pass needs, and that may be before the end of the layer.

        Raises:
            RuntimeError: If gradient checkpointing repeats the layer after its state changed, or
                repeats a pass that ran without gradients (`use_reentrant=True`).
        """
        if not self.needs_collecting or not self.training or torch.compiler.is_compiling():
            return
        if in_recomputation():
            if self._ran_without_grad:
                raise RuntimeError(
                    'gradient checkpointing with use_reentrant=True loses the auxiliary losses of '
                    'MoE layers: use use_reentrant=False'
                )
            if self._updated:
                raise RuntimeError(
                    'gradient checkpointing repeats a MoE layer whose state has already changed: '
                    'call backward() inside the collect_losses block'
                )
            return
        self._updated = False
        self._ran_without_grad = not torch.is_grad_enabled()
        global _already_warned
        uncollected = not self.recorder.active and torch.is_grad_enabled()
        if uncollected and not _already_warned:
            _already_warned = True
            warnings.warn(_UNCOLLECTED, stacklevel=2)


class RoutedMlp(MoeLayer):
    """Drop-in for timm's `Mlp` whose tokens are sent to experts by a router.

    Prefix tokens (class, registers) are routed like all others.

    Args:
        router: Tokens to `Routing`.
        experts: The experts.
    """

    router: Router

    def __init__(self, router: Router, experts: Experts) -> None:
        super().__init__()
        self.router = router
        self.experts = experts

    def run(self, x: Tensor) -> Tensor:
        """Route, run, report; (B, N, D) -> (B, N, D)."""
        routing = self.router(x if self.router.per_image else x.flatten(0, 1))
        out = run_experts(self.experts, x.flatten(0, 1), routing)
        self.record(routing.losses, self.statistics(routing, out.shape[0]), out.shape[0])
        out = out.view(x.shape)
        self.show({'router': routing}, x, out)
        return out

    def statistics(self, routing: Routing, num_tokens: int) -> dict[str, Tensor]:
        """Of a routing, if somebody listens.

        Args:
            routing: The routing.
            num_tokens: T.

        Returns:
            `load`, the share of assignments per expert (E,), of those that are kept; `unrouted`,
            the share of tokens without an expert, where there can be some; and what the router
            reports.
        """
        if not self.listens:
            return {}
        stats = {'load': expert_load(routing.indices, self.experts.num_experts, routing.kept)}
        if routing.kept is not None:
            stats['unrouted'] = 1 - token_mean(routing.kept.any(dim=-1).float())
        if routing.tokens is not None:
            served = torch.zeros(num_tokens, device=routing.tokens.device)
            served[routing.tokens] = 1
            stats['unrouted'] = 1 - token_mean(served)
        return {**stats, **routing.stats}

    @property
    def experts_per_token(self) -> float:
        """As many as the router says."""
        return self.router.experts_per_token
