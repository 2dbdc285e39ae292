"""Log lines that stay readable with many MoE layers."""

import re
from typing import Any

from mmengine.registry import LOG_PROCESSORS
from mmengine.runner import LogProcessor


@LOG_PROCESSORS.register_module()
class MoeLogProcessor(LogProcessor):
    """Keeps statistics and losses of single layers out of the lines of text.

    They go to TensorBoard and the JSON log at every logged iteration; a line of text per epoch and
    layer comes from `MoeStateHook`.
    """

    def get_log_after_iter(self, runner: Any, batch_idx: int, mode: str) -> tuple[dict, str]:
        """As mmengine's, without `<layer>/<name>: <value>` in the text.

        Args:
            runner: The runner.
            batch_idx: Index of the batch in the epoch.
            mode: 'train', 'val' or 'test'.

        Returns:
            Scalars by name, and the line of text.
        """
        scalars, text = super().get_log_after_iter(runner, batch_idx, mode)
        return scalars, re.sub(r'  [^\s:]+/[^\s:]+: \S+', '', text)
