"""Log lines that stay readable with many MoE layers."""

import re
from typing import Any

from mmengine.registry import LOG_PROCESSORS
from mmengine.runner import LogProcessor
from torch import nn

from vqmoe_vision.moe.collect import moe_layers

from .model import unwrapped

_COLUMNS = 100
# mmengine writes it in front of every message
_PREFIX = len('MM/dd HH:mm:ss - mmengine - INFO - ')


def wrapped(text: str) -> str:
    """A message whose lines fit a terminal of 100 columns; all but the first are indented."""
    lines, room = [''], _COLUMNS - _PREFIX
    for part in re.split(r' {2,}(?!\d)', text.strip()):
        if lines[-1].strip() and len(lines[-1]) + 2 + len(part) > room:
            lines.append('    ' + part)
            room = _COLUMNS
        else:
            lines[-1] += f'  {part}' if lines[-1] else part
    return '\n'.join(lines)


@LOG_PROCESSORS.register_module()
class MoeLogProcessor(LogProcessor):
    """Sums losses over layers in the lines of text, and fetches statistics of single layers.

    These go to TensorBoard and the JSON log at every logged iteration, as averages since the last.
    """

    def get_log_after_iter(self, runner: Any, batch_idx: int, mode: str) -> tuple[dict, str]:
        """As mmengine's, but for each `<layer>/<name>_loss` one `moe/<name>_loss` in the text."""
        scalars, text = super().get_log_after_iter(runner, batch_idx, mode)
        sums: dict[str, float] = {}
        layers = moe_layers(getattr(unwrapped(runner), 'routed_model', nn.Identity()))
        for name, value in scalars.items():
            name = name.removeprefix(f'{mode}/')  # which a config may ask for
            layer, _, kind = name.rpartition('/')
            if layer in layers:  # a model may have names with a slash of its own
                text = re.sub(rf'  {re.escape(name)}: \S+', '', text)
                if kind.endswith('_loss'):
                    sums[kind] = sums.get(kind, 0.0) + value
        text = re.sub(r'base_lr: (\S+) (lr: \1)(?=\s)', r'\2', text)
        statistics = getattr(unwrapped(runner), 'logged_statistics', None)
        if mode == 'train' and statistics is not None:
            summary = statistics.summary()
            statistics.reset()
            scalars |= summary
            left_out = [v for n, v in summary.items() if n.endswith('/nonfinite_tokens')]
            if any(left_out):
                sums['nonfinite_tokens'] = sum(left_out)
        text += ''.join(f'  moe/{kind}: {value:.4f}' for kind, value in sums.items())
        return scalars, wrapped(text)

    def get_log_after_epoch(self, *args: Any, **kwargs: Any) -> tuple:
        """As mmengine's; the text is wrapped.

        Args:
            *args: As mmengine's.
            **kwargs: As mmengine's.
        """
        *scalars, text = super().get_log_after_epoch(*args, **kwargs)
        return *scalars, wrapped(text)
