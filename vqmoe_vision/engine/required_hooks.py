"""The hooks that a training needs: a list in a config replaces that of its base."""

from mmengine.config import Config
from mmengine.hooks import CheckpointHook, EMAHook
from mmengine.registry import HOOKS
from mmengine.runner import Runner

from vqmoe_vision.installed import config_path
from vqmoe_vision.moe.config import check

from .model import MoeTrainingMixin, unwrapped

# Of both tasks.
_RUNTIME = '_base_/default_runtime.py'


def check_hooks(runner: Runner) -> None:
    """Refuses a training without the hooks that every config of this package has."""
    if not isinstance(unwrapped(runner), MoeTrainingMixin):
        return
    runtime = Config.fromfile(config_path(_RUNTIME), import_custom_modules=False)
    needed = [hook['type'] for hook in runtime.custom_hooks]
    missing = [
        name for name in needed if not any(isinstance(h, HOOKS.get(name)) for h in runner.hooks)
    ]
    listed = [hook['type'] for hook in runner.cfg.get('custom_hooks') or []]
    allowed = (
        f'it lacks {", ".join(missing)} of configs/{_RUNTIME}, as a list replaces that of a base: '
        "hooks of your own have names under default_hooks, such as default_hooks.ema.type='EMAHook'"
        ', or repeat the list, custom_hooks=[*_base_.custom_hooks, ...]'
    )
    check(not missing, 'custom_hooks', listed, allowed)
    _check_averages(runner)


def _check_averages(runner: Runner) -> None:
    """Hooks are in the order in which they are called."""
    places = list(enumerate(runner.hooks))
    moved = [at for at, hook in places if isinstance(hook, HOOKS.get('MoeStateHook'))]
    saved = [at for at, hook in places if isinstance(hook, CheckpointHook)]
    allowed = (
        'after MoeStateHook, whose codebooks would be those of the update before, and before the '
        "checkpoint hook, which would save other weights than are validated: leave it at 'NORMAL'"
    )
    for at, hook in places:
        if isinstance(hook, EMAHook):
            between = max(moved) < at < min(saved, default=len(places))
            check(between, 'EMAHook.priority', hook.priority, allowed)
