"""`benchmark.py training --overhead`: what the runner adds to the bare step of a config.

The bare step is what a loop of one's own would do: data preprocessing, forward, backward, clipping,
the optimizer, and the state that learns without gradients. What the runner adds is hooks, random
seeds, routing statistics, finite checks, the log, and losses that wait for it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from vqmoe_vision.moe.config import check

from .training import WARM_UP, Finished, measured_of, running, settings_of


class Pairs:
    """Measures each iteration of a loop, and beside it the bare step of the same batch."""

    def __init__(self, runner: Any, iterations: int) -> None:
        _check(runner.optim_wrapper)
        self.iterations = iterations
        self.seconds: list[tuple[float, float]] = []
        self._runner = runner
        self._run_iter = runner.train_loop.run_iter
        runner.train_loop.run_iter = self._run_pair

    def _run_pair(self, *args: Any) -> None:
        calls: list[Callable] = [partial(self._run_iter, *args), partial(self._bare, args[-1])]
        order = (0, 1) if len(self.seconds) % 2 else (1, 0)
        spent = [0.0, 0.0]
        for which in order:
            begin = time.process_time()
            calls[which]()
            spent[which] = time.process_time() - begin
        self.seconds.append((spent[0], spent[1]))
        if len(self.seconds) == WARM_UP + self.iterations:
            raise Finished

    def _bare(self, batch: Any) -> None:
        from vqmoe_vision.moe import collect_losses, update_state

        model, wrapper = self._runner.model, self._runner.optim_wrapper
        collects = partial(collect_losses, model.routed_model, update_state=False)
        model.collect, counted = collects, model.collect
        with wrapper.optim_context(model):
            losses = model(**_named(model.data_preprocessor(batch, True)), mode='loss')
        model.collect = counted
        sum(value for name, value in losses.items() if 'loss' in name).backward()
        parameters = [p for group in wrapper.optimizer.param_groups for p in group['params']]
        if wrapper.clip_grad_kwargs:
            torch.nn.utils.clip_grad_norm_(parameters, **wrapper.clip_grad_kwargs)
        wrapper.optimizer.step()
        wrapper.optimizer.zero_grad()
        update_state(model.routed_model)


def _check(wrapper: Any) -> None:
    from vqmoe_vision.engine.optim import scales_loss

    counts = wrapper._accumulative_counts
    allowed = '1 with --overhead, whose bare step steps every time'
    check(counts == 1, 'optim_wrapper.accumulative_counts', counts, allowed)
    allowed = 'dict(enabled=False) with --overhead, whose bare step has none'
    check(not scales_loss(wrapper), 'optim_wrapper.loss_scale', 'a loss scale', allowed)


def _named(data: Any) -> dict[str, Any]:
    return data if isinstance(data, dict) else dict(zip(('inputs', 'targets'), data, strict=True))


def measure_overhead(config: str, options: Sequence[str], iterations: int) -> dict[str, Any]:
    """Trains some iterations, each beside its bare step: `bare_ms`, and quartiles `added_ms`."""
    found: list[Pairs] = []
    with running(settings_of(config, options)) as runner:
        built = runner.call_hook

        def call_hook(name: str, **kwargs: Any) -> None:
            built(name, **kwargs)
            if name == 'before_train':
                found.append(Pairs(runner, iterations))

        runner.call_hook = call_hook
        runner.train()
    measured = measured_of(found[0].seconds, iterations)
    differences = [(whole - bare) * 1e3 for whole, bare in measured]
    quartiles = statistics.quantiles(differences, n=4) if iterations > 1 else differences * 3
    bare = statistics.median(bare for _, bare in measured) * 1e3
    return {'config': config, 'options': list(options), 'bare_ms': bare, 'added_ms': quartiles}
