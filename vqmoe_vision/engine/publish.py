"""What `tools/publish.py`, `tools/upcycle.py` and `tools/export.py` do: models for others."""

import argparse
import inspect
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from hashlib import sha256
from io import BytesIO
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub import ModelCard, ModelCardData
from mmengine.config import Config
from timm.models.vision_transformer import VisionTransformer

from vqmoe_vision.arguments import parser_of
from vqmoe_vision.models.compat import STATED, refuse_values, shorten
from vqmoe_vision.models.create import create_model, create_saved
from vqmoe_vision.models.export import (
    SUFFIXES,
    Exportable,
    differences,
    export_onnx,
    load_exported,
    preprocessing_of,
    require_packages,
    save,
    save_program,
    scratch_beside,
)
from vqmoe_vision.models.layers import method_of, moe_options
from vqmoe_vision.models.normalization import Normalization
from vqmoe_vision.models.weights import FOLDERS, find_source
from vqmoe_vision.moe import moe_layers
from vqmoe_vision.moe.config import check
from vqmoe_vision.provenance import commit, installed

from .checkpoint import classes_of, read_content
from .checkpoint_files import BEST, POINTER, last_checkpoint, write_atomically
from .cli import load_config, make_folder, run
from .config import as_arguments
from .escaping import as_markdown
from .model import load_trained, scope_of, weights_normalization
from .record import PACKAGES, read_numbers
from .web import export_web, photos_of

_TEMPLATE = Path(__file__).parent / 'templates/model_card.md'
# A string of a config that is the path of a file, from the root or a home on.
_PATH = re.compile(
    r"""(['"])((?:local-dir:|file://)?)(?:/|~[\w.-]*/)(?:[^'"\n]*/)?([^/'"\n]+)/*\1"""
)


def publish(argv: Sequence[str] | None = None) -> None:
    """Writes a checkpoint for others."""
    run(parser_of('publish'), argv, lambda args: print(f'wrote {_publish(args)}'))


def _publish(args: argparse.Namespace) -> Path:
    folder, there = Path(args.source).is_dir(), Path(args.source).exists()
    check(there, 'source', args.source, 'a work dir, or a checkpoint, that exists')
    allowed = 'a folder of a work dir, and a file that ends in .pth of a checkpoint'
    check(folder != args.out.endswith('.pth'), 'out', args.out, allowed)
    if folder:
        return publish_folder(args.source, args.out, args.checkpoint, args.license, args.numbers)
    for name in ('checkpoint', 'license', 'numbers'):
        given, allowed = getattr(args, name), 'left out, it is for the folder of a work dir'
        check(given is None, f'--{name}', given, allowed)
    return publish_checkpoint(args.source, args.out)


def publish_checkpoint(checkpoint: str, out: str) -> Path:
    """Writes the weights, the config and the classes of a checkpoint."""
    content, buffer = read_content(checkpoint), BytesIO()
    # what starting from the file and a reader want to know, and mmseg's functions elsewhere
    kept = (STATED, 'cfg', 'dataset_meta', 'epoch', 'iter', 'mmengine_version')
    meta = {k: v for k, v in _meta(content, checkpoint).items() if k in kept}
    _check_values(content['state_dict'], checkpoint)
    meta |= {'cfg': without_folders(str(meta['cfg']))} if 'cfg' in meta else {}
    torch.save({'meta': meta, 'state_dict': content['state_dict']}, buffer)
    digits = sha256(buffer.getvalue()).hexdigest()[:8]
    target = Path(out).with_name(f'{Path(out).stem}-{digits}.pth')
    target.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(target, buffer.getvalue())
    return target


def _check_values(state_dict: Mapping[str, Any], checkpoint: str) -> None:
    """Refuse weights that are no numbers, or whole ones, as far as names and values tell."""
    tensors = {name: value for name, value in state_dict.items() if isinstance(value, torch.Tensor)}
    expected = {
        name: value.to('meta', torch.float if name.endswith(('.weight', '.bias')) else value.dtype)
        for name, value in tensors.items()
        if value.float().nan_to_num(1, 1, 0).any()  # a mask has zeros and -inf alone
    }
    refuse_values(expected, {name: tensors[name] for name in expected}, checkpoint)


def without_folders(config: str) -> str:
    """Return the text of a config with the names of files in place of absolute paths."""
    return _PATH.sub(r'\1\2\3\1', config)


def _meta(content: Any, checkpoint: str) -> dict[str, Any]:
    found = content.get('meta') if isinstance(content, dict) and 'state_dict' in content else None
    allowed = "one with 'state_dict' and 'meta' of a training"
    check(isinstance(found, dict), 'checkpoint', checkpoint, allowed)
    return dict(found or {})


def publish_folder(
    work_dir: str,
    out: str,
    checkpoint: str | None = None,
    license_id: str | None = None,
    numbers: str | None = None,
) -> Path:
    """Writes weights, configuration and model card of a run."""
    target, run = free_folder(out), Path(work_dir)
    config_file = config_of(run)
    file = Path(checkpoint or chosen_checkpoint(run, 'choose one with --checkpoint'))
    config = load_config(str(config_file))
    model = load_trained(config, str(file), 'cpu')
    content = read_content(str(file), verify=False)
    meta = _meta(content, str(file))
    tested = read_numbers(numbers, model, file) if numbers else {}
    best = {  # of the validation after which it was written
        name.removeprefix('val/'): float(value.current())
        for name, value in ((content.get('message_hub') or {}).get('log_scalars') or {}).items()
        if file.name.startswith(BEST) and name.startswith('val/') and not name.endswith('time')
    }
    layers = tuple(f'{name}/' for name in moe_layers(model.routed_model))
    scores = [
        (use, as_markdown(name), value)
        for use, values in (('validation', best), ('test', tested))
        for name, value in values.items()
        if not name.startswith(layers)
    ]
    with written_whole(target) as folder:
        arguments = _write_model(model, config, meta, folder, license_id)
        of_machine = ('work_dir', 'resume', 'launcher')
        shared = Config({k: v for k, v in config.items() if k not in of_machine})
        (folder / config_file.name).write_text(
            without_folders(shared.pretty_text), encoding='utf-8'
        )
        _write_card(
            folder, model.routed_model, config, license_id,
            name=target.name, meta={n: as_markdown(v) for n, v in meta.items() if v is not None},
            checkpoint=file.name, scores=scores,
            arguments=json.dumps(arguments, indent=2), config_name=config_file.name,
            commits=[*map(as_markdown, (content.get('run_record') or {}).get('commits', []))],
            chosen='validation' if best else None,
        )  # fmt: skip
    return target


def free_folder(out: str) -> Path:
    """Where a folder is to be written."""
    target = Path(out).resolve()
    free = not target.exists() or (target.is_dir() and not any(target.iterdir()))
    check(free, 'out', out, 'a folder that does not exist, as nothing is overwritten')
    return target


@contextmanager
def written_whole(target: Path) -> Iterator[Path]:
    """A folder to write to, which gets its name when all is in it, and is gone after an error."""
    make_folder(target.parent)
    with scratch_beside(target) as scratch:
        folder = scratch / target.name
        folder.mkdir()
        yield folder
        mask = os.umask(0o077)  # there is no other way to read it
        os.umask(mask)
        for path in filter(Path.is_file, folder.rglob('*')):
            path.chmod(0o666 & ~mask)  # safetensors writes for its owner alone
        os.replace(folder, target)


def _write_model(
    model: Any, config: Config, meta: dict[str, Any], folder: Path, license_id: str | None
) -> dict[str, Any]:
    normalization = model.known_normalization
    if normalization is None:
        raise ValueError(
            'the run does not say how its images were normalised, which config.json has to: its '
            'data set is of another class than those of this package'
        )
    dataset = (config.get('test_dataloader') or {}).get('dataset')
    check(dataset is not None, 'test_dataloader', None, 'there, it says how images are prepared')
    preprocessing = model.test_preprocessing(dataset)
    preprocessing |= {'mean': normalization.mean, 'std': normalization.std}
    timms = model.routed_model
    timms.set_grad_checkpointing(False)
    classes = (meta.get('dataset_meta') or {}).get('classes') or ()
    names = classes if len(classes) == timms.num_classes else ()
    return save(timms, folder, preprocessing, names, license_id)


def config_of(run: Path) -> Path:
    """The config that a run left in its work dir."""
    found = sorted(run.glob('*.py'))
    names = ', '.join(path.name for path in found) or 'none'
    allowed = f'a work dir of one config, as tools/train.py leaves it: it has {names}'
    check(len(found) == 1, 'source', str(run), allowed)
    return found[0]


def chosen_checkpoint(run: Path, how: str = 'name one of them after the work dir') -> Path:
    """The best checkpoint of a work dir, or else the last."""
    found = sorted(run.glob(f'{BEST}*.pth'))
    if not found and (run / POINTER).is_file() and last_checkpoint(run).is_file():
        found = [last_checkpoint(run)]
    names = ', '.join(path.name for path in found) or 'no checkpoint of a training'
    check(len(found) == 1, 'source', str(run), f'a work dir of one, and this has {names}: {how}')
    return found[0]


def _write_card(
    folder: Path, model: Any, config: Config, license_id: str | None, **values: Any
) -> None:
    """Writes `README.md`: usage, data, command, numbers and licence."""
    method = getattr(model, 'method', None)
    task = 'image-classification' if model.num_classes else 'image-feature-extraction'
    ModelCard.from_template(
        ModelCardData(
            library_name='timm',
            pipeline_tag=task,
            tags=[task, 'timm', *(['mixture-of-experts', method] if method else [])],
            license=license_id,
        ),
        template_path=str(_TEMPLATE),
        classes=model.num_classes,
        method=method,
        preprocessing=model.pretrained_cfg,
        config=config,
        started_from=_sources(config),
        license=license_id,
        versions={name: version for name in PACKAGES if (version := installed(name))},
        commit=commit(),
        **values,
    ).save(folder / 'README.md')


def _sources(config: Config) -> list[str]:
    """What a training started from; of files the name alone, for folders are the writer's own."""
    named, of_timm = [config.get('load_from')], []
    for part in (config.model, config.model.get('backbone') or {}):
        names = ('checkpoint', 'checkpoint_path', 'features', 'upcycle')
        named += [part.get(name) for name in names]
        if part.get('pretrained'):
            file = (part.get('pretrained_cfg_overlay') or {}).get('file')
            named.append(file)
            of_timm += [] if file else [f"timm's weights of {part.get('model_name')}"]
    # those of others, on the web and on the hub, are called in full
    folders = r'^(?!\w[\w+-]*://|hf-hub:)(local-dir:)?.*/'
    return [re.sub(folders, r'\1', str(n).rstrip('/')) for n in named if n] + of_timm


def upcycle(argv: Sequence[str] | None = None) -> None:
    """Writes a model with experts that are made of a dense one."""
    run(parser_of('upcycle'), argv, _upcycle)


def _upcycle(args: argparse.Namespace) -> None:
    method = method_of(args.model) if timm.is_model(args.model) else None
    allowed = (
        'a model with experts, such as vit_small_vqmoe; a model of timm gets them by '
        'convert_to_moe, or in a config by model.moe.method'
    )
    check(method is not None, 'model', args.model, allowed)
    source = find_source(args.source)[1]
    # of what a folder of timm names beside its weights, what the model has
    known = {*inspect.signature(VisionTransformer).parameters, *moe_options(str(method))}
    options = {name: value for name, value in source.arguments.items() if name in known}
    options |= {**as_arguments(args.cfg_options), 'upcycle': args.source}
    with written_whole(free_folder(args.out)) as folder:
        torch.manual_seed(args.seed)
        model: Any = create_model(args.model, **options)
        found, names = model.weights_report, source.config.get('label_names')
        if 'head.weight' not in found.loaded or not isinstance(names, list):  # of its classes
            names = []
        save(model, folder, _preprocessing(model, options), names, source.config.get('license'))
        report = '\n'.join(found.lines())
        (folder / 'upcycling.txt').write_text('\n'.join([report, '', *found.listed(), '']))
    print(report, f'wrote {args.out}', sep='\n')


def _preprocessing(model: Any, options: dict[str, Any]) -> dict[str, Any]:
    """How images are prepared for the weights, entries of timm's `pretrained_cfg`."""
    channels = model.patch_embed.proj.in_channels
    stated = options.get('pretrained_cfg_overlay') or {}
    normalization = None
    if channels == 3:  # which is what weights say of themselves
        normalization = weights_normalization(model, None, options)
    elif {'mean', 'std'} <= stated.keys():
        normalization = Normalization.of(stated, channels=channels)
    if normalization is None:
        raise ValueError(
            f'source={options["upcycle"]!r} does not say how images were normalised for it, which '
            'config.json has to: write --cfg-options pretrained_cfg_overlay.mean=[...] '
            f'pretrained_cfg_overlay.std=[...], with {channels} numbers each'
        )
    return preprocessing_of(model.pretrained_cfg) | {
        'input_size': (channels, *model.patch_embed.img_size),
        'mean': normalization.mean,
        'std': normalization.std,
    }


def export(argv: Sequence[str] | None = None, int8: Callable[..., object] | None = None) -> None:
    """Writes a model as a file for others, and compares the file with the model.

    `int8`, which writes with `--int8`, is called as `export_onnx`.
    """
    run(parser_of('export'), argv, partial(_export, int8=int8))


def _export(args: argparse.Namespace, int8: Any) -> None:
    out = Path(args.out)
    if args.web:
        return _export_page(args)
    check(out.suffix in SUFFIXES, 'out', args.out, f'a name that ends in {" or ".join(SUFFIXES)}')
    onnx = out.suffix == '.onnx'
    check(onnx or args.opset is None, '--opset', args.opset, 'only for a file of ONNX')
    if onnx:
        require_packages()
    make_folder(out.parent)
    model, _ = _exportable(args)
    if args.int8:
        int8(model, out, args.batch, args.opset)
    elif onnx:
        export_onnx(model, out, args.batch, args.opset)
    else:
        save_program(model, out, args.batch)
    shape = ', '.join(map(str, (args.batch or 'B', *model.input_size)))
    print(f'wrote {out}: images ({shape}) float32 to {", ".join(model.outputs)}')
    # in int8 some of many are predicted otherwise
    batches = (args.batch,) if args.batch is not None else (1, 32 if args.int8 else 4)
    print(*differences(model, load_exported(out), batches), sep='\n')


def _export_page(args: argparse.Namespace) -> None:
    for name in ('size', 'batch', 'opset', 'int8'):
        given = getattr(args, name)
        check(not given, f'--{name}', given, 'left out with --web')
    require_packages()
    with written_whole(free_folder(args.out)) as folder:
        model, source = _exportable(args)
        graph = export_web(model, folder, Path(args.source).name, photos_of(source))
        print(differences(graph, load_exported(folder / 'model.onnx'), (1,))[0])
    print(f'wrote {args.out}: python -m http.server --directory {args.out}')


def _exportable(args: argparse.Namespace) -> tuple[Exportable, Any]:
    """What becomes a graph, and the test images of its config, if it has one."""
    source, checkpoint, options = args.source, args.checkpoint, args.cfg_options
    size = tuple(args.size) if args.size else None
    if source.startswith(FOLDERS) or timm.is_model(source):
        check(size is None, '--size', size, 'only for a segmentor')
        return Exportable.of(_timm_model(source, checkpoint, as_arguments(options))), None
    if Path(source).is_dir():
        folder = Path(source)
        source = str(config_of(folder))
        checkpoint = checkpoint or str(chosen_checkpoint(folder))
    allowed = f'a work dir, a timm model, or a config with its checkpoint: {source} CHECKPOINT OUT'
    check(checkpoint is not None, 'source', source, allowed)
    config = load_config(source, options)
    model = load_trained(config, checkpoint, 'cpu')
    if not hasattr(model, 'exportable'):
        raise ValueError(
            f'config {source!r} has a {type(model).__name__}: its model must be a Classifier or a '
            'MoeEncoderDecoder'
        )
    found = model.exportable(size)
    if classes := classes_of(str(checkpoint)):
        found.about['classes'] = classes
    if not args.web:
        return found, None
    try:
        with scope_of(config):
            return found, model.source(config.test_dataloader.dataset)
    except (OSError, RuntimeError, ValueError) as error:
        print(f'the page has no test images: {error}')
        return found, None


def _timm_model(name: str, checkpoint: str | None, options: dict[str, Any]) -> Any:
    model: Any
    if name.startswith(FOLDERS):
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
