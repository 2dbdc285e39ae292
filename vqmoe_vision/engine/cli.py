"""What `tools/train.py` and `tools/test.py` do, for every task."""

import argparse
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.dist import broadcast_object_list, get_rank, get_world_size
from mmengine.registry import RUNNERS
from mmengine.runner import Runner

from vqmoe_vision.moe.config import check

from .checkpoint_files import in_use, newest_before, newest_checkpoint
from .command import CHOICES, follow, quiet, run
from .config import (
    add_config_options,
    bases_by_name,
    check_fields,
    expand,
    find_config,
    innermost,
    merge_options,
    take_ours,
)
from .hooks import check_hooks, check_training_data
from .model import unwrapped
from .optim import use_amp
from .processes import (
    LAUNCHERS,
    check_batch,
    check_configs,
    check_datasets,
    join,
    together,
    with_wrapper,
)
from .record import passed_on, write_numbers
from .seeding import check_batches
from .sharded import check_parallel, spread
from .trained import without_sources

# What every tool says of its first argument, and those of trained models of the second.
CONFIG_HELP = 'config file, or vqmoe_vision::NAME for one that comes with the package'
CHECKPOINT_HELP = 'file written by tools/train.py, or the folder of timm that is made of it'


def train(argv: Sequence[str] | None = None) -> None:
    """Trains the model of a config."""
    parser = _parser('Train a model.')
    parser.add_argument(
        '--resume', action='store_true', help='go on from the latest checkpoint in the work dir'
    )
    parser.add_argument(
        '--amp', action='store_true', help='mixed precision: bfloat16, float16 on an older GPU'
    )
    run(parser, argv, _train)


def test(argv: Sequence[str] | None = None) -> None:
    """Tests a checkpoint of the model of a config."""
    parser = _parser('Test a checkpoint.')
    parser.add_argument('checkpoint', help=CHECKPOINT_HELP)
    parser.add_argument('--out', type=Path, help='JSON file to write the metrics to')
    parser.add_argument('--show-dir', help='folder to write predictions over their images to')
    parser.add_argument(
        '--tta', action='store_true', help="augment the test as the config's tta_pipeline says"
    )
    run(parser, argv, _test)


def load_config(
    path: str, options: dict[str, Any] | None = None, import_modules: bool = True
) -> Config:
    """Reads a config file and merges the options of the command line into it."""
    with bases_by_name():
        config = Config.fromfile(find_config(path), import_custom_modules=import_modules)
    merge_options(config, options or {})
    expand(config)
    return config


def make_folder(folder: Path) -> None:
    """Makes a folder, before the work whose results go there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / '.writable').touch()
        (folder / '.writable').unlink(missing_ok=True)  # others may try the same folder meanwhile
    except OSError as error:
        raise ValueError(f'folder {folder} cannot be written: {error.strerror}') from error


def augment_test(config: Config) -> None:
    """Lets a test predict several versions of each image and merge the predictions."""
    for dataset in innermost(config.test_dataloader.dataset):
        dataset.pipeline = config.tta_pipeline
    config.model = dict(config.tta_model, module=config.model)


def _parser(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument('config', help=CONFIG_HELP)
    parser.add_argument(
        '--work-dir', help="where logs and checkpoints go (default: ./work_dirs/<config's name>)"
    )
    add_config_options(parser)
    parser.add_argument('--launcher', choices=LAUNCHERS, default='none')
    # torchrun sets the variable; torch.distributed.launch passes the option
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0)
    parser.add_argument(
        '--log', choices=CHOICES, help='a bar, as on a terminal, or all lines of the log'
    )
    parser.add_argument('--debug', action='store_true', help='show the full trace of an error')
    return parser


def _train(args: argparse.Namespace) -> None:
    with together(args.launcher), ExitStack() as alone:
        config = _configure(args)
        told = take_ours(config)
        if args.amp:
            use_amp(config)
        join(args.launcher, config)
        check_configs(config)
        check_batch(config, args.cfg_options)
        check_parallel(config)
        asked = deepcopy(config)
        if get_rank() == 0:
            make_folder(Path(config.work_dir))
            alone.enter_context(in_use(Path(config.work_dir)))
        of_first = [_latest(args, Path(config.work_dir)) if get_rank() == 0 else None]
        broadcast_object_list(of_first)
        if (latest := of_first[0]) is not None:
            config.load_from, config.resume = latest, True
        runner = _runner_of(config, loads=latest is not None)
        follow(runner, args.log, told)
        if latest is not None:  # what it went on from is no part of what the run is
            for name in ('load_from', 'resume'):
                runner.cfg.pop(name)
                runner.cfg.update({name: asked[name]} if name in asked else {})
            runner.dump_config()
        check_datasets(runner, ('train', 'val'))
        if isinstance(runner, Runner):
            spread(runner)
            check_hooks(runner)
            check_batches(runner)
            check_training_data(runner)
        runner.train()


def _latest(args: argparse.Namespace, folder: Path) -> str | None:
    say = partial(print, file=sys.stderr)
    if args.resume:
        return str(newest_checkpoint(folder, say))
    # whatever torchrun has started again goes on from its own
    if (before := newest_before(folder)) is None:
        return None
    try:
        return str(newest_checkpoint(folder, say, before))
    except FileNotFoundError:
        say('begins anew: nothing that this run has saved reads completely')
        return None


def _test(args: argparse.Namespace) -> None:
    with together(args.launcher):
        config = _configure(args)
        if args.tta:
            augment_test(config)
        told = take_ours(config)
        if not Path(args.checkpoint).exists():
            raise FileNotFoundError(f'checkpoint {args.checkpoint!r} does not exist')
        join(args.launcher, config)
        check_configs(config)
        writes = args.out is not None and get_rank() == 0
        if writes:  # before the work
            check(not args.out.is_dir(), '--out', str(args.out), 'a file, and this is a folder')
            if not passed_on(args.out):
                make_folder(args.out.parent)
        config.load_from, config.resume = args.checkpoint, False
        if args.show_dir is not None:
            allowed = f'one process shows them: of {get_world_size()} each sees a part'
            check(get_world_size() == 1, '--show-dir', args.show_dir, allowed)
            config.default_hooks.visualization.draw = True
            config.visualizer.save_dir = args.show_dir
        runner = _runner_of(config, loads=True, tests=True)
        follow(runner, args.log, told)
        check_datasets(runner, ('test',))
        metrics = runner.test()
        if writes:
            write_numbers(args.out, metrics, unwrapped(runner))


def _configure(args: argparse.Namespace) -> Config:
    config = load_config(args.config, args.cfg_options)
    if config.get('model') is None:
        raise ValueError(
            f'config {args.config!r} has no model: it is a part of other configs, or a comparison, '
            'which tools/compare.py runs'
        )
    check_fields(config)
    config.launcher = args.launcher
    # as in mmseg: the command line, then the config, then the name of the config
    if args.work_dir is not None:
        config.work_dir = args.work_dir
    elif config.get('work_dir') is None:
        config.work_dir = str(Path('work_dirs') / Path(args.config).stem)
    return config


def _runner_of(config: Config, loads: bool, tests: bool = False) -> Runner:
    """The runner of a config, whose model gets the weights of its run and reads no others."""
    name, methods = config.get('runner_type', 'Runner'), dict[str, Any]()
    allowed = f'a runner of the registry, which are {", ".join(sorted(RUNNERS.module_dict))}'
    check(RUNNERS.get(name) is not None, 'runner_type', name, allowed)
    kind = quiet(with_wrapper(RUNNERS.get(name)))
    if loads:
        methods['build_model'] = lambda self, model: kind.build_model(self, without_sources(model))
    if tests:  # often in the work dir of the training, whose config stays as it is
        methods['dump_config'] = lambda self: None
    ours: Any = type(kind.__name__, (kind,), methods)
    return ours.from_cfg(config)
