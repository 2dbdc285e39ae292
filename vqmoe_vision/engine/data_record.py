"""Which data a run has seen, as far as that can be said without reading a pixel."""

from __future__ import annotations

from collections.abc import Iterable
from hashlib import sha256
from os.path import relpath
from typing import Any

from mmengine.dataset import BaseDataset


def described(dataset: Any) -> dict[str, Any]:
    """The number of samples, and a digest of what they are called, in their order."""
    names = _names(dataset)
    digest = None if names is None else sha256('\n'.join(names).encode()).hexdigest()[:16]
    return {'samples': len(dataset), 'digest': digest}


def _names(dataset: Any) -> Iterable[str] | None:
    if not isinstance(dataset, BaseDataset):
        return getattr(dataset, 'names', None)
    infos = map(dataset.get_data_info, range(len(dataset)))
    root = dataset.data_root or '.'
    kinds = ('img_path', 'seg_map_path')
    return [' '.join(relpath(info[kind], root) for kind in kinds if kind in info) for info in infos]
