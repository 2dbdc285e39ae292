"""Mixture-of-experts layers: what every one of them owes, and the one that routes by a `Router`.

Legend: B images, N tokens per image, T = B * N, D width, E experts.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .codebooks import Quantized
from .dispatch import run_experts
from .distributed import sum_over_ranks
from .experts import Experts
from .losses import Loss, token_mean
from .raw_patches import (
    RawPatches,
    RecomputationGuard,
    in_recomputation,
    refuse_reentrant,
    to_be_repeated,
)
from .routing import Router, Routing, Switched, expert_load
from .valid import ValidTokens

UNCOLLECTED = (
    'training without collect_losses(model): auxiliary losses are not part of the loss and '
    'codebooks do not learn'
)
_said: set[str] = set()

# What a pass decided for every token, by name; a module that decided has the name it has in the
# layer. Then come the tokens (B, N, D) that the layer was given, and its answer.
Decisions = dict[str, Routing | Quantized | Tensor]


@torch.compiler.assume_constant_result  # a compiled model says it as it is compiled
def warn_once(text: str) -> None:
    """Warn, unless this process has said this text."""
    if text not in _said:
        _said.add(text)
        warnings.warn(text, stacklevel=2)


class Recorder:
    """Keeps what a layer reports while a `collect_losses` block is open, and sums of a step."""

    def __init__(self) -> None:
        # of what is decided for every token
        self.watcher: Callable[[Decisions, Tensor, Tensor], None] | None = None
        self.sums: Tensor | None = None  # over passes, which state learns from
        self.collected: Any = None  # `Collected` of the last block
        self.stop()

    def stop(self) -> None:
        """Stop keeping, and forget."""
        self.active = False
        self.losses: list[tuple[str, Loss, int]] = []  # the last is the number of tokens
        self.stats: list[tuple[str, Tensor]] = []

    def __getstate__(self) -> dict:
        return vars(type(self)())  # copies and pickles of a model start closed and empty


class MoeLayer(Switched):
    """Base of every mixture-of-experts layer: tensor in, tensor of the same shape out.

    You need `run` and `experts_per_token`. `run` changes no buffers; there it calls `show` and, if
    it has losses or statistics, once `record`. The members of a layer with state come next, then
    those that few layers need.
    """

    # of a padded batch, while a block of the model runs
    valid: ValidTokens | None = None

    needs_collecting = True  # whether it has losses, or state that learns without gradients
    permutation_equivariant = True  # not where tokens are routed by position
    experts: Experts

    def __init__(self) -> None:
        super().__init__()
        self.recorder = Recorder()
        self.guard = RecomputationGuard()

    # --- you need

    def run(self, x: Tensor) -> Tensor:
        """What the layer computes; (B, N, D) -> (B, N, D)."""
        raise NotImplementedError

    @property
    def experts_per_token(self) -> float:
        """Experts that compute for a token, on average."""
        raise NotImplementedError

    def record(
        self, losses: Mapping[str, Loss], stats: Mapping[str, Tensor], num_tokens: int
    ) -> None:
        """Report what a pass gave; kept only by an open block of `collect_losses`.

        Args:
            losses: Weighted losses by name: means over tokens, 0-dim float32, or balance losses.
            stats: Detached statistics by name: scalars, or shares (E,) that sum to 1.
            num_tokens: Of the pass, by which losses count where processes share a batch.
        """
        if self.listens:
            for name, loss in losses.items():
                self._watch(loss)
                self.recorder.losses.append((name, loss, num_tokens))
            self.recorder.stats.extend(stats.items())

    @property
    def listens(self) -> bool:
        """Whether somebody keeps what is recorded now, so that statistics are worth computing."""
        return self.recorder.active and not in_recomputation()

    def show(self, decisions: Decisions, inputs: Tensor, outputs: Tensor) -> None:
        """Let whoever watches see what a pass decided; nothing is kept or computed for it here.

        Args:
            decisions: Routing or quantization by the module's name in the layer; or any tensor that
                begins with (B, N), or (T,).
            inputs: What the layer was given, (B, N, D); (T, 1, D) of tokens of a padded batch.
            outputs: Its answer, as `inputs`.
        """
        if self.recorder.watcher is not None and not in_recomputation():
            self.recorder.watcher(decisions, inputs, outputs)

    @contextmanager
    def switched(self, on: Tensor) -> Iterator[None]:
        """A block in which no token goes to experts that are off, False in `on` (E,) bool."""
        before = [(part, part.switches) for part in self.modules() if isinstance(part, Switched)]
        try:
            for part, _ in before:
                part.switches = on
            yield
        finally:
            for part, switches in before:
                part.switches = switches

    # --- with state that learns without gradients

    def apply_update(self) -> bool:
        """Change it, once per step; returns whether it changed, or may have."""
        return False

    @classmethod
    def apply_updates(cls, layers: Sequence[Any]) -> list[bool]:
        """`apply_update` of all layers of this type of a model, which may share their operators."""
        return [layer.apply_update() for layer in layers]

    def moves_state(self) -> bool:
        """Whether there is state that `apply_update` has to move while the layer trains."""
        return type(self).apply_update is not MoeLayer.apply_update

    @property
    def observed(self) -> dict:
        """What passes have left for the next `apply_update`, for a checkpoint; {} if nothing."""
        return {} if self.recorder.sums is None else {'counts': self.recorder.sums}

    @observed.setter
    def observed(self, kept: dict) -> None:
        sums = kept.get('counts')
        self.recorder.sums = None if sums is None else sums.to(next(self.parameters()).device)

    def apply_begin(self) -> bool:
        """Change state that is due before the next pass; returns whether it may have changed."""
        return False

    def start_training(self, num_updates: int) -> None:
        """Hear how many updates a training will have, before it starts."""

    def restart(self) -> str | None:
        """Begin a new training from the weights as they are; returns what changed, in words."""
        return None

    # --- rarely

    summands: int = 1  # as a router's

    def run_valid(self, x: Tensor, valid: ValidTokens) -> Tensor:
        """`run` of a padded batch: all is as without the padding, whose answer is zero.

        A layer that decides for each token alone has `valid.one_by_one(self.run, x)` here.
        """
        kind = type(self).__name__
        raise NotImplementedError(f'{kind} takes no padded images: it has no run_valid')

    def reads(self) -> RawPatches | None:
        """Where the layer finds the images that it decides by; None if it sees tokens alone."""
        return None

    def options_in_size(self, num_tokens: int) -> dict:
        """Options that it left to the number of tokens, for a model of another number of them."""
        return {}

    def fit_state(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Make the state of a layer of other sizes or form fit, by names relative to this one.

        What fits is changed, what is of no use here left out; the rest stays as it is.
        """
        omitted = self.omitted(state)
        return {name: value for name, value in state.items() if name not in omitted}

    def omitted(self, names: Iterable[str]) -> set[str]:
        """Names of another form's state, relative to the layer, that every loading leaves out."""
        return set()

    @property
    def has_discrete(self) -> bool:
        """Whether there is a discrete branch, which `to_discrete` keeps alone."""
        return False

    def to_discrete(self) -> dict:
        """Keep the discrete branch alone; returns the options that are now others."""
        raise ValueError(f'{type(self).__name__} has no discrete branch to keep')

    # --- as every layer has it

    def forward(self, x: Tensor) -> Tensor:
        """`run`, which is not repeated where the answer, or what it is for, would be another one.

        Raises:
            RuntimeError: Gradient checkpointing repeats a layer after its state changed or other
                images were seen, or a pass that ran without gradients (`use_reentrant=True`).
        """
        collecting = self.training and self.needs_collecting
        if not in_recomputation():
            if collecting and not self.recorder.active and torch.is_grad_enabled():
                warn_once(UNCOLLECTED)
            out = self._run(x)
            self._watch(out)
            return out
        self.guard.repeated()
        out = self._run(x)
        if collecting and out.requires_grad:
            out.register_hook(refuse_reentrant)
        return out

    def _run(self, x: Tensor) -> Tensor:
        return self.run(x) if self.valid is None else self.run_valid(x, self.valid)

    def _watch(self, answer: Tensor | Loss) -> None:
        """Let no backward pass of an answer repeat this layer as another one."""
        if torch.compiler.is_compiling() or not to_be_repeated():
            return
        raw_patches = self.reads()
        if (self.training and self.moves_state()) or raw_patches is not None:
            self.guard.watch(answer, raw_patches)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        # the one place that torch's, timm's and mmengine's loading have in common
        names = [name[len(prefix) :] for name in state_dict if name.startswith(prefix)]
        for name in self.omitted(names):
            del state_dict[prefix + name]
        super()._load_from_state_dict(state_dict, prefix, *args)

    def __prepare_scriptable__(self) -> nn.Module:
        raise RuntimeError(
            'torch.jit.script is not possible with MoE layers, and deprecated: use torch.export'
        )


class RoutedMlp(MoeLayer):
    """Drop-in for timm's `Mlp` whose tokens, prefix tokens too, go to experts by a router.

    Args:
        router: Tokens to `Routing`.
        experts: The experts.
    """

    router: Router

    def __init__(self, router: Router, experts: Experts) -> None:
        super().__init__()
        self.router, self.experts = router, experts
        self.needs_collecting = router.has_losses or self.moves_state()
        self.permutation_equivariant = router.permutation_equivariant
        self.summands = router.summands

    def reads(self) -> RawPatches | None:
        """What its router does."""
        return self.router.raw_patches

    def run(self, x: Tensor) -> Tensor:
        """Route, run, report; (B, N, D) -> (B, N, D)."""
        return self._routed(x, self.router(x if self.router.per_image else x.flatten(0, 1)))

    def run_valid(self, x: Tensor, valid: ValidTokens) -> Tensor:
        """As `MoeLayer`; a router of images is told which tokens are there."""
        if not self.router.per_image:
            return valid.one_by_one(self.run, x)
        routing = self.router(x, valid)
        return valid.one_by_one(lambda tokens: self._routed(tokens, routing), x)

    def _routed(self, x: Tensor, routing: Routing) -> Tensor:
        tokens = x.flatten(0, 1)
        out = run_experts(self.experts, tokens, routing).view(x.shape)
        num_tokens = tokens.shape[0]  # not `len`, which a trace warns of
        stats = self.statistics(routing, num_tokens) if self.listens else {}
        self.record(routing.losses, stats, num_tokens)
        if self.training and self.listens:
            self.observe(routing)
        self.show({'router': routing}, x, out)
        return out

    def observe(self, routing: Routing) -> None:
        """Keep what the router's state learns from, of a pass of training, for `apply_update`."""
        if self.router.has_state:
            seen, before = self.router.observe(routing).detach(), self.recorder.sums
            self.recorder.sums = seen if before is None else before + seen

    def apply_update(self) -> bool:
        """Let the router's state learn from what all passes and ranks have observed."""
        sums, self.recorder.sums = self.recorder.sums, None
        return sums is not None and self.router.update(sum_over_ranks(sums))

    def moves_state(self) -> bool:
        """Whether the router has such state."""
        return self.router.has_state

    def statistics(self, routing: Routing, num_tokens: int) -> dict[str, Tensor]:
        """What the router reports, `load`, and `unrouted`, where some tokens can be.

        Args:
            routing: Whose kept assignments make the load (E,).
            num_tokens: T.
        """
        load = routing.load
        if load is None:
            load = expert_load(routing.indices, self.experts.num_experts, routing.kept)
        stats = {'load': load}
        if (kept := routing.chosen().kept) is not None:
            stats['unrouted'] = 1 - token_mean(kept.any(dim=-1).float())
        if routing.tokens is not None:
            served = routing.tokens.new_zeros(num_tokens, dtype=torch.float32)
            served[routing.tokens] = 1
            stats['unrouted'] = 1 - token_mean(served)
        return {**stats, **routing.stats}

    @property
    def experts_per_token(self) -> float:
        """As many as the router says."""
        return self.router.experts_per_token
