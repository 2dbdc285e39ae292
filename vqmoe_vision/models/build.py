"""A model of this package as timm's builder makes it, and the weights that it begins with."""

from collections.abc import Callable
from dataclasses import replace
from os import PathLike
from typing import Any

from timm.models import PretrainedCfg, build_model_with_cfg, get_arch_name, get_pretrained_cfg
from torch import nn

from ..moe.config import check
from ..moe.methods import METHODS
from .layers import moe_options
from .normalization import check_normalization, stated_normalization
from .upcycle import read_upcycling, refuse_unused
from .weights import Described, load_weights, overlay_for, place_of, source_of


def build(
    make: Callable[..., nn.Module],
    name: str,
    method: str,
    pretrained: bool,
    upcycle: str | PathLike[str] | None = None,
    known_as: str = '',
    **kwargs: Any,
) -> Any:
    """A model with experts of any class, and its weights, which timm may know by another name."""
    check(isinstance(pretrained, bool), 'pretrained', pretrained, 'True or False')
    check(not (pretrained and upcycle), 'pretrained', True, f'False with upcycle={upcycle!r}')
    saved = kwargs.get('pretrained_model_args') or {}  # what config.json says, since timm 1.0.31
    if saved:
        # without those of saved weights that the other options leave without effect
        options = {k: v for k, v in kwargs.items() if k in moe_options(method) - {'moe_layers'}}
        past = {'upcycling', *METHODS[method].config.of_preset(**options).unused()}
        kwargs = {
            k: v for k, v in kwargs.items() if k not in past or k not in saved or saved[k] != v
        }
    starts = pretrained or upcycle is not None
    if not starts and kwargs.get('upcycling') is not None:
        ways = 'pretrained=True' if known_as else 'upcycle=SOURCE or pretrained=True'
        refuse_unused(read_upcycling(kwargs['upcycling']), ways)
    depth = kwargs.get('depth', 3)
    # of `features_only`: the last three blocks, or all of a shallower model
    out_indices = kwargs.pop('out_indices', min(3, depth) if type(depth) is int else 3)
    if starts or kwargs.get('pretrained_cfg') or kwargs.get('pretrained_cfg_overlay') or known_as:
        source = Source(known_as or name, kwargs, saved_as=name if saved else '')
        overlay, cache_dir = source.overlay, kwargs.get('cache_dir')
        if starts:
            overlay, described = overlay_for(upcycle, source.config, overlay, source.own, cache_dir)
        if known_as and source.name:
            exists = not pretrained or bool(source_of({**source.config, **overlay}))
            check(exists, 'pretrained', True, f'False, timm has no weights of {known_as}')
            kwargs['pretrained_cfg'] = replace(source.known, architecture=name, custom_load=False)
        kwargs['pretrained_cfg_overlay'] = overlay
    features = {'out_indices': out_indices, 'feature_cls': 'getter'}
    model: Any = build_model_with_cfg(
        make, name, False, feature_cfg=features, method=method, **kwargs
    )
    if starts:
        whole = model.model if kwargs.get('features_only') else model
        load_weights(whole, described, cache_dir, source.follow)
        model.pretrained_cfg.update({k: whole.pretrained_cfg[k] for k in ('mean', 'std')})
    return model


class Source:
    """What a call states of weights, and what timm knows by the name of a model."""

    def __init__(self, name: str, kwargs: dict[str, Any], saved_as: str = '') -> None:
        stated = kwargs.get('pretrained_cfg')
        stated = stated.to_dict() if isinstance(stated, PretrainedCfg) else stated or ''
        check(isinstance(stated, str | dict), 'pretrained_cfg', stated, 'a dictionary, or a tag')
        overlay = kwargs.get('pretrained_cfg_overlay') or {}
        check(isinstance(overlay, dict), 'pretrained_cfg_overlay', overlay, 'a dictionary')
        channels = kwargs.get('in_chans')
        channels = channels if type(channels) is int and channels > 0 else 3  # the model says it
        numbers = stated_normalization(overlay, 'pretrained_cfg_overlay.', channels=channels)
        self.overlay = overlay if numbers is None else {**overlay, **vars(numbers)}
        self.name, self.config = '', {} if isinstance(stated, str) else stated
        if isinstance(stated, dict):
            check_normalization(stated, 'pretrained_cfg.')
        else:
            self.name = f'{get_arch_name(name)}.{stated}' if stated else name
            self.known = get_pretrained_cfg(self.name) or PretrainedCfg()
            self.config = place_of(self.known.to_dict())
        self.own = Described.of({}, self.name or saved_as, kwargs.get('pretrained_model_args'))
        # numbers that the call states are before those of a run
        self.follow = not {'mean', 'std'} & {*overlay, *self.config}
