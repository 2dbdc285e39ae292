"""What mmengine does anew for each run, which takes longer than most of the runs of the tests."""

import sys
from copy import deepcopy
from functools import wraps
from pathlib import Path
from types import SimpleNamespace
from typing import Any

CONFIGS = Path(__file__).parents[1] / 'configs'


def quicken() -> None:
    """Once in a process that has imported mmengine, if it has."""
    if 'mmengine.config' not in sys.modules:
        return
    from mmengine.config import Config
    from mmengine.dataset import base_dataset
    from yapf.yapflib import yapf_api

    # it looks for garbage at each data set, through all that the tests import
    base_dataset.gc = SimpleNamespace(collect=lambda: 0)

    @wraps(yapf_api.FormatCode)
    def as_it_is(text: str, **_: Any) -> tuple[str, bool]:
        compile(text, 'config', 'exec')
        return f'{text}\n', False

    yapf_api.FormatCode = as_it_is  # of the config in each checkpoint

    read, known = Config._file2dict, {}

    def from_memory(filename: str, *options: Any, **more: Any) -> Any:
        if CONFIGS not in Path(filename).parents:  # which tests write
            return read(filename, *options, **more)
        # `load_config` reads otherwise than mmengine
        key = repr((filename, options, more, Config._get_cfg_path, Config._merge_a_into_b))
        if key not in known:
            known[key] = read(filename, *options, **more)
        return deepcopy(known[key])

    Config._file2dict = staticmethod(from_memory)
