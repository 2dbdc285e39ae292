"""Log lines that stay readable with many MoE layers."""

from typing import Any

from mmengine.registry import LOG_PROCESSORS
from mmengine.runner import LogProcessor


@LOG_PROCESSORS.register_module()
class MoeLogProcessor(LogProcessor):
    """Keeps statistics and losses of single layers out of the lines of text.

    They go to TensorBoard and the JSON log at every logged iteration; a line of text per epoch and
    layer comes from `MoeStateHook`.

    Args:
        **kwargs: As for mmengine's `LogProcessor`.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(log_with_hierarchy=True, **kwargs)

    def _collect_scalars(
        self, custom_cfg: list, runner: Any, mode: str, reserve_prefix: bool = False
    ) -> dict:
        scalars = super()._collect_scalars(custom_cfg, runner, mode, reserve_prefix)
        if reserve_prefix:  # for TensorBoard and JSON
            return scalars
        return {name: value for name, value in scalars.items() if '/' not in name}
