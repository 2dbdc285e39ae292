"""What `tools/upcycle.py` does: a dense ViT as timm's folder of a model with experts."""

import argparse
import inspect
from collections.abc import Sequence
from typing import Any

import timm
import torch
from timm.models.vision_transformer import VisionTransformer

from vqmoe_vision.models.create import create_model
from vqmoe_vision.models.hosts import method_of
from vqmoe_vision.models.layers import moe_options
from vqmoe_vision.models.normalization import Normalization
from vqmoe_vision.models.saved import preprocessing_of, save
from vqmoe_vision.models.weights import find_source
from vqmoe_vision.moe.config import check

from .command import run
from .config import add_config_options, as_arguments
from .publish import free_folder, written_whole
from .trained import weights_normalization

REPORT = 'upcycling.txt'


def upcycle(argv: Sequence[str] | None = None) -> None:
    """Writes a model with experts that are made of a dense one."""
    parser = argparse.ArgumentParser(
        description='Make a model with experts of a dense vision transformer, and write it as a '
        'folder that timm reads, with a report of every tensor.'
    )
    parser.add_argument(
        'source', help='name of a timm model, hf-hub:NAME, local-dir:FOLDER, or a file of weights'
    )
    parser.add_argument('model', help='name of a model with experts, such as vit_small_vqmoe')
    parser.add_argument('out', help='folder to write, which does not exist yet or is empty')
    parser.add_argument(
        '--seed', type=int, default=0, help='of what is drawn anew, such as routers (default: 0)'
    )
    add_config_options(
        parser,
        'arguments of timm.create_model, for example num_experts=8 upcycling.drop=0.5 img_size=32',
    )
    parser.add_argument('--debug', action='store_true', help='show the full trace of an error')
    run(parser, argv, _upcycle)


def _upcycle(args: argparse.Namespace) -> None:
    own = timm.is_model(args.model) and method_of(args.model) is not None
    allowed = (
        'a model with experts, such as vit_small_vqmoe; a model of timm gets them by '
        'convert_to_moe, or in a config by model.moe.method'
    )
    check(own, 'model', args.model, allowed)
    options = _sizes(args.source, args.model) | as_arguments(args.cfg_options)
    options['upcycle'] = args.source
    with written_whole(free_folder(args.out)) as folder:
        torch.manual_seed(args.seed)
        model: Any = create_model(args.model, **options)
        save(model, folder, _preprocessing(model, options), *_kept(model, args.source))
        report = '\n'.join(model.weights_report.lines())
        each = '\n'.join(model.weights_report.listed())
        (folder / REPORT).write_text(f'{report}\n\n{each}\n')
    print(report, f'wrote {args.out}', sep='\n')


def _sizes(source: str, name: str) -> dict[str, Any]:
    """Arguments that a folder of timm names beside its weights, as far as the model has them."""
    method = method_of(name)
    assert method is not None
    known = {*inspect.signature(VisionTransformer).parameters, *moe_options(method)}
    return {k: v for k, v in find_source(source)[1].arguments.items() if k in known}


def _kept(model: Any, source: str) -> tuple[list[str], str | None]:
    """What the source calls its classes, if its head is kept, and the licence of its weights."""
    known = find_source(source)[1].config
    names = known.get('label_names')
    if 'head.weight' not in model.weights_report.loaded or not isinstance(names, list):
        names = []
    return names, known.get('license')


def _preprocessing(model: Any, options: dict[str, Any]) -> dict[str, Any]:
    """How images are prepared for the weights, entries of timm's `pretrained_cfg`."""
    channels = model.patch_embed.proj.in_channels
    normalization = _normalization(model, options, channels)
    if normalization is None:
        numbers = f'[{",".join(["0.5"] * channels)}]'
        images = '' if channels == 3 else f' of {channels} channels'
        raise ValueError(
            f'source={options["upcycle"]!r} does not say how images{images} were normalised for '
            f'it, which config.json has to: write --cfg-options '
            f'pretrained_cfg_overlay.mean={numbers} pretrained_cfg_overlay.std={numbers}, with the '
            'numbers of the weights'
        )
    own = {
        'input_size': (channels, *model.patch_embed.img_size),
        'mean': normalization.mean,
        'std': normalization.std,
    }
    return preprocessing_of(model.pretrained_cfg) | own


def _normalization(model: Any, options: dict[str, Any], channels: int) -> Normalization | None:
    """How images are normalised; what weights say of themselves is about three channels."""
    if channels == 3:
        return weights_normalization(model, None, options)
    stated = options.get('pretrained_cfg_overlay') or {}
    return Normalization.of(stated, channels=channels) if {'mean', 'std'} <= stated.keys() else None
