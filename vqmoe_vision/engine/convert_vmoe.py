"""What `tools/convert_vmoe.py` does: a released V-MoE as timm's folder."""

import argparse
from collections.abc import Sequence
from typing import Any

from vqmoe_vision.models.saved import preprocessing_of, save
from vqmoe_vision.models.vmoe import load_vmoe

from .command import run
from .config import add_config_options
from .hub_folder import free_folder, written_whole


def convert_vmoe(argv: Sequence[str] | None = None) -> None:
    """Writes a V-MoE of JAX as a folder that timm reads."""
    parser = argparse.ArgumentParser(
        description='Write a released V-MoE of github.com/google-research/vmoe as a folder that '
        'timm reads.'
    )
    parser.add_argument(
        'checkpoint', help='path of its files without .index and .data-00000-of-00008'
    )
    parser.add_argument('out', help='folder to write')
    parser.add_argument(
        '--without-head', action='store_true', help='leave out the classifier, for the features'
    )
    add_config_options(
        parser, 'what no file says, for example top_k=2 eval_capacity_factor=1.5 (default: top_k=2)'
    )
    parser.add_argument('--debug', action='store_true', help='show the full trace of an error')
    run(parser, argv, _convert)


def _convert(args: argparse.Namespace) -> None:
    target = free_folder(args.out)
    model: Any = load_vmoe(args.checkpoint, head=not args.without_head, **args.cfg_options)
    config, method = model.pretrained_cfg, model.moe_config
    with written_whole(target) as folder:
        arguments = save(model, folder, preprocessing_of(config))
    blocks = ', '.join(map(str, arguments['moe_layers']))
    print(
        f'wrote {target}: {config["architecture"]} with {method.num_experts} experts in blocks '
        f'{blocks}, images of {arguments["img_size"]} pixels, {model.num_classes} classes; '
        f'in no file, and so as given or by default: top_k={method.top_k}, '
        f'eval_capacity_factor={method.eval_capacity_factor}'
    )
