"""What `tools/publish.py` and `tools/upcycle.py` do: models as folders that timm reads."""

import argparse
import inspect
import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import timm
import torch
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from mmengine.config import Config
from timm.models.vision_transformer import VisionTransformer

from vqmoe_vision.models.compat import STATED
from vqmoe_vision.models.create import create_model
from vqmoe_vision.models.export import preprocessing_of, save
from vqmoe_vision.models.layers import method_of, moe_options
from vqmoe_vision.models.normalization import Normalization
from vqmoe_vision.models.weights import digest_of, find_source, is_file_name
from vqmoe_vision.moe import moe_layers
from vqmoe_vision.moe.config import check
from vqmoe_vision.provenance import commit, installed

from .checkpoint import read_content
from .checkpoint_files import BEST, POINTER, SaveError, last_checkpoint, reason_of
from .cli import load_config, make_folder
from .command import run
from .config import add_config_options, as_arguments
from .record import read_numbers
from .trained import load_trained, weights_normalization

_TEMPLATE = Path(__file__).parent / 'templates/model_card.md'
_PACKAGES = ('vqmoe-vision', 'torch', 'timm', 'onedl-mmengine', 'onedl-mmsegmentation')
_LOADERS = {'training': 'train', 'validation': 'val', 'test': 'test'}


def publish(argv: Sequence[str] | None = None) -> None:
    """Writes a checkpoint for others."""
    parser = argparse.ArgumentParser(
        description="Write a run's model as a folder that timm and the Hugging Face hub read, or a "
        'checkpoint with its weights, its config and its classes, without optimizer, schedulers '
        'and log.'
    )
    parser.add_argument('source', help='work dir of tools/train.py, or a checkpoint of it')
    parser.add_argument(
        'out',
        help='of a work dir: folder to write; of a checkpoint: NAME.pth, which is written as '
        'NAME-<8 digits of sha256>.pth',
    )
    parser.add_argument(
        '--checkpoint', metavar='FILE', help='of the work dir (default: the best, or else the last)'
    )
    parser.add_argument('--license', metavar='ID', help="the hub's name, such as apache-2.0")
    parser.add_argument('--numbers', metavar='FILE', help='JSON that tools/test.py --out wrote')
    parser.add_argument('--debug', action='store_true', help='show the full trace of an error')
    run(parser, argv, lambda args: print(f'wrote {_publish(args)}'))


def _publish(args: argparse.Namespace) -> Path:
    source, out = Path(args.source), args.out
    check(source.exists(), 'source', args.source, 'a work dir, or a checkpoint, that exists')
    folder = source.is_dir()
    allowed = 'a folder of a work dir, and a file that ends in .pth of a checkpoint'
    check(folder != out.endswith('.pth'), 'out', out, allowed)
    options = {name: getattr(args, name) for name in ('checkpoint', 'license', 'numbers')}
    if folder:
        return publish_folder(args.source, out, *options.values())
    for name, value in options.items():
        check(value is None, f'--{name}', value, 'left out, it is for the folder of a work dir')
    return publish_checkpoint(args.source, out)


def publish_checkpoint(checkpoint: str, out: str) -> Path:
    """Writes the weights, the config and the classes of a checkpoint."""
    target, content = Path(out), read_content(checkpoint)
    # what starting from the file and a reader want to know, and mmseg's functions elsewhere
    kept = (STATED, 'cfg', 'dataset_meta', 'epoch', 'iter', 'mmengine_version')
    meta = {k: v for k, v in _meta(content, checkpoint).items() if k in kept}
    target.parent.mkdir(parents=True, exist_ok=True)
    unnamed = target.with_suffix('.part')
    try:
        torch.save({'meta': meta, 'state_dict': content['state_dict']}, unnamed)
        return unnamed.replace(target.with_name(f'{target.stem}-{digest_of(unnamed)[:8]}.pth'))
    except RuntimeError as error:  # of torch's writer
        raise SaveError(f'{target} could not be written ({reason_of(error)})') from error
    finally:  # of a disk that is full
        unnamed.unlink(missing_ok=True)


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
    valid = license_id is None or re.fullmatch(r'[a-z0-9][a-z0-9.+-]*', license_id)
    allowed = "a name of the hub in small letters, such as 'apache-2.0' or 'cc-by-nc-4.0'"
    check(bool(valid), 'license', license_id, allowed)
    config_file = config_of(run)
    how = 'choose one with --checkpoint'
    file = chosen_checkpoint(run, how) if checkpoint is None else Path(checkpoint)
    config = load_config(str(config_file))
    model = load_trained(config, str(file), 'cpu')
    content = read_content(str(file), verify=False)
    meta = _meta(content, str(file))
    tested = read_numbers(numbers, model, file) if numbers else {}
    best = _validated(content) if file.name.startswith(BEST) else {}
    layers = tuple(f'{name}/' for name in moe_layers(model.routed_model))
    scores = [
        {'use': use, 'metric': name, 'value': value}
        for use, values in {'validation': best, 'test': tested}.items()
        for name, value in values.items()
        if not name.startswith(layers)
    ]
    with written_whole(target) as folder:
        arguments = _write_model(model, config, meta, folder, license_id)
        of_machine = ('work_dir', 'resume', 'launcher')
        shared = Config({k: v for k, v in config.items() if k not in of_machine})
        shared.dump(folder / config_file.name)
        record = content.get('run_record') or [None, []]
        _write_card(
            folder, target.name, model.routed_model, config,
            scores, license_id,
            arguments=json.dumps(arguments, indent=2), config_name=config_file.name, meta=meta,
            checkpoint=file.name, commits=[c for c in record[1] if c],
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
    with TemporaryDirectory(dir=target.parent, prefix=f'.{target.name}.') as scratch:
        folder = Path(scratch) / target.name
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


def _validated(content: dict[str, Any]) -> dict[str, float]:
    """Metrics of the validation after which the best checkpoint was written."""
    logged = (content.get('message_hub') or {}).get('log_scalars') or {}
    values = {n.removeprefix('val/'): v for n, v in logged.items() if n.startswith('val/')}
    return {n: float(v.current()) for n, v in values.items() if n not in ('data_time', 'time')}


def _write_card(
    folder: Path,
    name: str,
    model: Any,
    config: Config,
    scores: list[dict[str, Any]],
    license_id: str | None,
    **values: Any,
) -> None:
    """Writes `README.md`: usage, data, command, numbers and licence."""
    method, data = getattr(model, 'method', None), {}
    for use, loader in _LOADERS.items():
        dataset = (config.get(f'{loader}_dataloader') or {}).get('dataset') or {}
        if 'type' in dataset:
            data[use] = {'type': dataset['type'], 'split': dataset.get('split')}
    task = 'image-classification' if model.num_classes else 'image-feature-extraction'
    results = [
        EvalResult(
            task_type=task,
            dataset_type=str(data[score['use']]['type']),
            dataset_name=str(data[score['use']]['type']),
            dataset_split=data[score['use']]['split'],
            metric_type=score['metric'],
            metric_value=score['value'],
        )
        for score in scores
        if score['use'] in data and model.num_classes
    ]
    metadata = ModelCardData(
        library_name='timm',
        pipeline_tag=task,
        tags=[task, 'timm', *(['mixture-of-experts', method] if method else [])],
        license=license_id,
        model_name=name if results else None,
        eval_results=results or None,
    )
    versions = {package: installed(package) for package in _PACKAGES}
    at = {'vqmoe-vision': f' (commit {now})'} if (now := commit()) else {}
    ModelCard.from_template(
        metadata,
        template_path=str(_TEMPLATE),
        name=name,
        architecture=model.pretrained_cfg['architecture'],
        classes=model.num_classes,
        method=method,
        preprocessing=model.pretrained_cfg,
        data=data,
        started_from=_sources(config),
        scores=scores,
        license=license_id,
        versions=[f'{n} {version}{at.get(n, "")}' for n, version in versions.items() if version],
        **values,
    ).save(folder / 'README.md')


def _sources(config: Config) -> list[str]:
    """What a training started from; of files the name alone, for folders are the writer's own."""
    named = [config.get('load_from')]
    for part in (config.model, config.model.get('backbone') or {}):
        names = ('checkpoint', 'checkpoint_path', 'features', 'upcycle')
        named += [part.get(name) for name in names]
        if part.get('pretrained'):
            file = (part.get('pretrained_cfg_overlay') or {}).get('file')
            named.append(file or f"timm's weights of {part.get('model_name')}")
    return [_without_folder(str(name)) for name in named if name]


def _without_folder(source: str) -> str:
    """A source as others may read it: of a path on this machine the last part alone."""
    if '://' in source:
        return source
    scheme, colon, path = source.rpartition('local-dir:')
    of_files = colon or path[:1] in '/.~' or is_file_name(path) or Path(path).exists()
    return scheme + colon + (Path(path).name if of_files else path)


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
        numbers = f'[{",".join(["0.5"] * channels)}]'
        images = '' if channels == 3 else f' of {channels} channels'
        raise ValueError(
            f'source={options["upcycle"]!r} does not say how images{images} were normalised for '
            f'it, which config.json has to: write --cfg-options '
            f'pretrained_cfg_overlay.mean={numbers} pretrained_cfg_overlay.std={numbers}, with the '
            'numbers of the weights'
        )
    return preprocessing_of(model.pretrained_cfg) | {
        'input_size': (channels, *model.patch_embed.img_size),
        'mean': normalization.mean,
        'std': normalization.std,
    }
