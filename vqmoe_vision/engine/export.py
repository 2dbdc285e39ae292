"""What `tools/export.py` does: a trained model as a file of ONNX or torch.export."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import timm

from vqmoe_vision.models.compat import shorten
from vqmoe_vision.models.create import create_model, create_saved
from vqmoe_vision.models.export import (
    SUFFIXES,
    Exportable,
    differences,
    export_onnx,
    load_exported,
    require_packages,
    save_program,
)
from vqmoe_vision.models.weights import FOLDERS
from vqmoe_vision.moe.config import check

from .checkpoint import read_content
from .cli import load_config, make_folder
from .command import run
from .config import add_config_options, as_arguments
from .publish import chosen_checkpoint, config_of
from .trained import load_trained

# Arguments that the command line gives itself, of a name or a file, and of a folder.
_SAID = {'model_name', 'pretrained', 'checkpoint_path'}


def export(argv: Sequence[str] | None = None, int8: Callable[..., object] | None = None) -> None:
    """Writes a model as a file for others, and compares the file with the model.

    `int8`, which writes with `--int8`, is called as `export_onnx`.
    """
    parser = argparse.ArgumentParser(
        description='Write a model as a file of ONNX or of torch.export, and compare the two.'
    )
    parser.add_argument(
        'source',
        help='config, or work dir of tools/train.py, or name of a timm model, or local-dir:FOLDER '
        'of tools/publish.py',
    )
    parser.add_argument(
        'checkpoint',
        nargs='?',
        help='weights of the config or the name (default: its own); of a work dir the best or last',
    )
    parser.add_argument('out', help='file to write: NAME.onnx or NAME.pt2')
    parser.add_argument(
        '--size',
        type=int,
        nargs=2,
        metavar=('H', 'W'),
        help='of the images of a segmentor, in pixels (default: its window)',
    )
    parser.add_argument('--batch', type=int, help='images per call (default: any number)')
    parser.add_argument('--opset', type=int, help="of ONNX (default: that of torch's exporter)")
    parser.add_argument(
        '--int8',
        action='store_const',
        const=int8,
        help='linear layers in int8, those of the experts included',
    )
    add_config_options(parser)
    parser.add_argument('--debug', action='store_true', help='show the full trace of an error')
    run(parser, argv, _export)


def _export(args: argparse.Namespace) -> None:
    out = Path(args.out)
    check(out.suffix in SUFFIXES, 'out', args.out, f'a name that ends in {" or ".join(SUFFIXES)}')
    onnx = out.suffix == '.onnx'
    check(onnx or args.opset is None, '--opset', args.opset, 'only for a file of ONNX')
    if onnx:
        require_packages()
    make_folder(out.parent)
    model = _exportable(args)
    if args.int8 is not None:
        args.int8(model, out, args.batch, args.opset)
    elif onnx:
        export_onnx(model, out, args.batch, args.opset)
    else:
        save_program(model, out, args.batch)
    shape = ', '.join(map(str, (args.batch or 'B', *model.input_size)))
    print(f'wrote {out}: images ({shape}) float32 to {", ".join(model.outputs)}')
    # in int8 some of many are predicted otherwise
    batches = (args.batch,) if args.batch is not None else (1, 32 if args.int8 else 4)
    print(*differences(model, load_exported(out), batches), sep='\n')


def _exportable(args: argparse.Namespace) -> Exportable:
    source, checkpoint, options = args.source, args.checkpoint, args.cfg_options
    size = tuple(args.size) if args.size else None
    if source.startswith(FOLDERS) or timm.is_model(source):
        check(size is None, '--size', size, 'only for a segmentor')
        return Exportable.of(_timm_model(source, checkpoint, as_arguments(options)))
    if Path(source).is_dir():
        folder = Path(source)
        source = str(config_of(folder))
        checkpoint = checkpoint or str(chosen_checkpoint(folder))
    allowed = f'a work dir, a timm model, or a config with its checkpoint: {source} CHECKPOINT OUT'
    check(checkpoint is not None, 'source', source, allowed)
    model = load_trained(load_config(source, options), checkpoint, 'cpu')
    if not hasattr(model, 'exportable'):
        raise ValueError(
            f'config {source!r} has a {type(model).__name__}: its model must be a Classifier or a '
            'MoeEncoderDecoder'
        )
    found, content = model.exportable(size), read_content(checkpoint, verify=False)
    meta = content.get('meta') if isinstance(content, dict) else None
    if classes := ((meta or {}).get('dataset_meta') or {}).get('classes'):
        found.about['classes'] = list(classes)
    return found


def _timm_model(name: str, checkpoint: str | None, options: dict[str, Any]) -> Any:
    model: Any
    folder = name.startswith(FOLDERS)
    said = _SAID | ({'source', 'pretrained_cfg'} if folder else set())
    for option in sorted(said & options.keys()):
        allowed = f'left out, SOURCE and CHECKPOINT say which model and weights: {name}'
        check(False, option, options[option], allowed)
    if folder:
        check(checkpoint is None, 'checkpoint', checkpoint, f'left out, {name} has its weights')
        model = create_saved(name, **options)
    elif checkpoint is not None:
        model = create_model(name, checkpoint_path=checkpoint, **options)
    else:
        pretrained = timm.models.is_model_pretrained(name)
        check(pretrained, 'checkpoint', None, f'a file of weights: {name} FILE OUT')
        model = create_model(name, pretrained=True, **options)
    report = getattr(model, 'weights_report', None)
    fresh = () if report is None else report.initialised
    # timm drops a head of other classes in silence; a file in its place was loaded whole
    given, classes = (model.pretrained_cfg.get('num_classes'), getattr(model, 'num_classes', 0))
    if report is None and checkpoint is None and classes not in (0, given):
        fresh = (f'a head of {classes} classes',)
    if fresh:
        raise ValueError(
            f'weights of {checkpoint or name!r} have nothing for {shorten(fresh)}, which would be '
            'random in the file: leave out the option that asks for it'
        )
    return model
