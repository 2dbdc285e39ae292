"""One of timm's own vision transformers with experts, by an entry point that can be saved.

Models that `convert_to_moe` has changed, and configs with `moe.method`, are saved as `moe_host`.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import timm
from timm.models import get_arch_name, model_entrypoint, register_model

from ..moe.config import check
from .arguments import check_method, moe_options, named_failures
from .build import build_sparse, check_sources, config_of_name, tagged
from .convert import put_fresh_layers
from .hosts import MOE_HOST
from .sources import source_of
from .sparse_model import MoeEva, MoeVisionTransformer

__all__: list[str] = []  # register_model adds the entry point


@register_model
def moe_host(
    pretrained: bool = False, host: str | None = None, method: str | None = None, **kwargs: Any
) -> MoeVisionTransformer | MoeEva:
    """A vision transformer of timm with MoE layers."""
    known = isinstance(host, str) and timm.is_model(host) and get_arch_name(host) != MOE_HOST
    check(known, 'host', host, "the name of one of timm's VisionTransformers or Evas")
    check_method(method)
    assert host is not None and method is not None
    check_sources(get_arch_name(host), pretrained, kwargs)
    allowed = 'None: pretrained=True starts from weights of the host, or of pretrained_cfg_overlay'
    check(kwargs.get('upcycle') is None, 'upcycle', kwargs.get('upcycle'), allowed)
    config = kwargs.pop('pretrained_cfg', None)
    weights_of = tagged(host, config)
    if weights_of:
        found = config_of_name(weights_of)
        overlay = kwargs.get('pretrained_cfg_overlay') or {}
        exists = bool(source_of({**found.to_dict(), **overlay}))
        check(not pretrained or exists, 'pretrained', True, f'False, timm has no weights of {host}')
        # the filter reads state dicts
        config = replace(found, architecture=MOE_HOST, custom_load=False)
    make = partial(_fresh, host)
    return build_sparse(
        make, MOE_HOST, method, pretrained, weights_of=weights_of, pretrained_cfg=config, **kwargs
    )


def _fresh(host: str, method: str, **kwargs: Any) -> Any:
    names = moe_options(method) | {'upcycling'}
    options = {name: kwargs.pop(name) for name in names & kwargs.keys()}
    entry = partial(model_entrypoint(host), pretrained=False)
    with named_failures(entry, kwargs, host):
        model = entry(**kwargs)
    put_fresh_layers(model, method, **options)
    return model
