"""What `tools/train.py`, `test.py` and `predict.py` do, and how every tool runs."""

import argparse
import logging
import os
import re
import select
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from errno import EDQUOT, EFBIG, ENOSPC
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from pickle import UnpicklingError
from tempfile import TemporaryFile
from typing import Any
from unittest.mock import patch

from mmengine.config import Config
from mmengine.dist import broadcast_object_list, get_rank, get_world_size, master_only
from mmengine.registry import MODELS, RUNNERS
from mmengine.runner import Runner
from mmengine.utils import import_modules_from_strings, track_iter_progress
from torch import nn
from typing_extensions import override

from vqmoe_vision.arguments import parser_of
from vqmoe_vision.moe.config import check

from .checkpoint import existing
from .checkpoint_files import (
    SaveError,
    in_use,
    newest_before,
    newest_checkpoint,
    newest_time,
    write_atomically,
)
from .checkpoint_hook import end_by
from .config import (
    base_path,
    check_fields,
    check_folders,
    expand,
    find_config,
    innermost,
    merge,
    merge_options,
    parse_options,
    share_batch,
    take_ours,
)
from .escaping import printable
from .hooks import check_hooks, check_training_data
from .images import list_images
from .model import check_model, unwrapped, without_sources
from .optim import suit_card, use_amp
from .processes import (
    LostError,
    RankError,
    check_configs,
    check_datasets,
    join,
    together,
)
from .record import write_numbers
from .seeding import check_batches
from .sharded import ShardingHook, check_parallel
from .step_values import NonFiniteError
from .terminal import of_terminal, shown


def train(argv: Sequence[str] | None = None) -> None:
    """Trains the model of a config."""
    run(parser_of('train'), argv, _train)


def test(argv: Sequence[str] | None = None) -> None:
    """Tests a checkpoint of the model of a config."""
    run(parser_of('test'), argv, _test)


def predict(argv: Sequence[str] | None = None) -> None:
    """Predicts images, and writes what the task of a model makes of them."""
    run(parser_of('predict'), argv, _predict)


def load_config(
    path: str, options: dict[str, Any] | None = None, import_modules: bool = True
) -> Config:
    """Reads a config file and merges the options of the command line into it."""
    ours = (('_get_cfg_path', base_path), ('_merge_a_into_b', merge))
    with ExitStack() as patched:
        for name, own in ours:
            patched.enter_context(patch.object(Config, name, staticmethod(own)))
        config = Config.fromfile(find_config(path), import_custom_modules=False)
    if import_modules and (modules := config.get('custom_imports')):
        import_modules_beside(config.filename, **modules)
    merge_options(config, options or {})
    expand(config)
    return config


def import_modules_beside(
    path: str, imports: str | list[str], allow_failed_imports: bool = False
) -> None:
    """Import the `custom_imports` of a config: installed modules, or those in its own folder."""
    folder = str(Path(path).resolve().parent)
    for name in [imports] if isinstance(imports, str) else imports:
        if find_spec(package := name.partition('.')[0]) is None:
            sys.path.append(folder)  # behind the installed packages
            is_there = allow_failed_imports or find_spec(package) is not None
            allowed = f'a module that is installed, in {folder}, or in a folder of PYTHONPATH'
            check(is_there, 'custom_imports', name, allowed)
    import_modules_from_strings(imports, allow_failed_imports)


def make_folder(folder: Path) -> None:
    """Makes a folder, before the work whose results go there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        TemporaryFile(dir=folder).close()  # no link can stand in the place of its name
    except OSError as error:
        raise ValueError(f'folder {folder} cannot be written: {error.strerror}') from error


def augment_test(config: Config) -> None:
    """Lets a test predict several versions of each image and merge the predictions."""
    for dataset in innermost(config.test_dataloader.dataset):
        dataset.pipeline = config.tta_pipeline
    config.model = dict(config.tta_model, module=config.model)


def _train(args: argparse.Namespace) -> None:
    with ExitStack() as alone, together(args.launcher):
        config = _configure(args)
        told = take_ours(config)
        if args.amp:
            use_amp(config)
        told += f'\n{suit_card(config, args.config)}'
        join(args.launcher, config)
        share_batch(config, get_world_size(), args.cfg_options)
        check_configs(config)
        check_parallel(config)
        _check_parts(config, ('train', 'val'))
        if get_rank() == 0:
            make_folder(Path(config.work_dir))
            alone.enter_context(in_use(Path(config.work_dir)))
        of_first = [_latest(args, Path(config.work_dir)) if get_rank() == 0 else None]
        broadcast_object_list(of_first)
        latest = of_first[0]
        runner = _runner_of(config, loads=latest is not None)
        if latest is not None:  # which is no part of the config: that says what the run is
            runner._load_from, runner._resume = latest, True
        check_datasets(runner, ('train', 'val'))
        if (options := config.get('parallel')) is not None:
            runner.register_hook(ShardingHook(**options))
        check_hooks(runner)
        check_batches(runner)
        check_training_data(runner)
        with shown(runner, args.log, told):
            runner.train()


def _predict(args: argparse.Namespace) -> None:
    files = [file for images in args.images for file in list_images(images)]
    config = load_config(args.config, args.cfg_options)
    for name in ('model', 'test_dataloader'):
        check(config.get(name) is not None, f'{args.config}: {name}', None, 'a config')
    with MODELS.switch_scope_and_registry(config.get('default_scope')) as models:
        kind: Any = models.get(config.model.type)
    allowed = 'Classifier or MoeEncoderDecoder'
    check(hasattr(kind, 'predictions'), 'model.type', config.model.type, allowed)
    predictions = kind.predictions(args, files)
    try:
        for file in track_iter_progress(files, file=sys.stdout):
            predictions.add(file)
    finally:  # of a damaged image the others are not lost
        print(f'\n{predictions.end()}')


def _check_parts(config: Config, splits: tuple[str, ...]) -> None:
    """Finds mistakes in options of the model, and missing data, before a file is written."""
    check_folders(config, splits)
    with suppress(RuntimeError):  # of a network that cannot be without memory
        check_model(config)


def _latest(args: argparse.Namespace, folder: Path) -> str | None:
    say = partial(print, file=sys.stderr)
    if args.resume:
        return str(newest_checkpoint(folder, say))
    # whatever torchrun has started again goes on from its own
    if (before := newest_before(folder)) is not None:
        try:
            return str(newest_checkpoint(folder, say, before))
        except FileNotFoundError:
            say('begins anew: nothing that this run has saved reads completely')
    elif newest_time(folder):  # a new run would take its identity, and delete what is outdated
        raise ValueError(
            f'--work-dir {folder} holds the checkpoints of an earlier run: add --resume to go on '
            'from them, or name another --work-dir'
        )
    return None


def _test(args: argparse.Namespace) -> None:
    with together(args.launcher):
        config = _configure(args)
        if args.tta:
            augment_test(config)
        told = take_ours(config)
        join(args.launcher, config)
        check_configs(config)
        existing(args.checkpoint)
        _check_parts(config, ('test',))
        if writes := args.out is not None and get_rank() == 0:  # before the work
            check(not args.out.is_dir(), '--out', str(args.out), 'a file, and this is a folder')
            if not args.out.exists():  # as /dev/stdout does
                make_folder(args.out.parent)
        config.load_from, config.resume = args.checkpoint, False
        if args.show_dir is not None:
            allowed = f'one process shows them: of {get_world_size()} each sees a part'
            check(get_world_size() == 1, '--show-dir', args.show_dir, allowed)
            config.default_hooks.visualization.draw = True
            config.visualizer.save_dir = args.show_dir
        runner = _runner_of(config, loads=True, tests=True)
        check_datasets(runner, ('test',))
        with shown(runner, args.log, told):
            metrics = runner.test()
        if writes:
            write_numbers(args.out, metrics, unwrapped(runner))


def _configure(args: argparse.Namespace) -> Config:
    config = load_config(args.config, args.cfg_options)
    allowed = f'there: {args.config} is a part of others, or for tools/compare.py'
    check(config.get('model') is not None, 'model', None, allowed)
    check_fields(config)
    config.launcher = args.launcher
    # as in mmseg: the command line, then the config, then the name of the config
    if args.work_dir is not None:
        config.work_dir = args.work_dir
    elif config.get('work_dir') is None:
        config.work_dir = str(Path('work_dirs') / Path(args.config).stem)
    return config


class ToolRunner(Runner):
    """mmengine's, which wraps models for a CPU too and shows its config to the log file alone."""

    def build_logger(self, *args: Any, **kwargs: Any) -> Any:
        """As mmengine's; `shown` lets a terminal see its lines again."""
        logger = super().build_logger(*args, **kwargs)
        for handler in of_terminal(logger):
            handler.setLevel(max(handler.level, logging.WARNING))
        return logger

    @override
    @master_only
    def dump_config(self) -> None:
        name = f'{self.timestamp}.py' if self.cfg.filename is None else self.cfg.filename
        write_atomically(Path(self.work_dir, Path(name).name), self.cfg.dump().encode())

    def wrap_model(self, model_wrapper_cfg: dict | None, model: nn.Module) -> nn.Module:
        """Wraps models for a CPU too, but none that `parallel` spreads; the config stays as is."""
        if self.distributed and self.cfg.get('parallel') is not None:
            model_wrapper_cfg = {'type': 'Unwrapped'}
        elif self.distributed:
            unused = {'find_unused_parameters': self.cfg.get('find_unused_parameters', False)}
            model_wrapper_cfg = {'type': 'OwnDataParallel', **(model_wrapper_cfg or unused)}
        return super().wrap_model(model_wrapper_cfg, model)


def _runner_of(config: Config, loads: bool, tests: bool = False) -> Runner:
    """The runner of a config, whose model gets the weights of its run and reads no others."""
    name, methods = config.get('runner_type', 'Runner'), dict[str, Any]()
    kind = RUNNERS.get(name)
    known = isinstance(kind, type) and issubclass(kind, Runner)
    check(known, 'runner_type', name, 'Runner, or a class of the registry that is made of it')
    if loads:
        methods['build_model'] = lambda self, model: kind.build_model(self, without_sources(model))
    if tests:  # often in the work dir of the training, whose config stays as it is
        methods['dump_config'] = lambda self: None
    ours: Any = type(kind.__name__, (ToolRunner, kind), methods)
    return ours.from_cfg(config)


# Errors whose message says what a user did wrong; any other type is named in front of its message.
_USER_ERRORS = (
    ValueError,
    FileNotFoundError,
    ModuleNotFoundError,
    NonFiniteError,
    SaveError,
    LostError,
)


def run(
    parser: argparse.ArgumentParser,
    argv: Sequence[str] | None,
    action: Callable[[argparse.Namespace], None],
) -> None:
    """Runs a tool so that a mistake is one line, and the trace comes with `--debug` only."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    debug = '--debug' in arguments
    options: dict[str, Any] = {}
    try:
        args = parser.parse_args(arguments)
        if hasattr(args, 'cfg_options'):
            args.cfg_options = options = parse_options(args.cfg_options)
        # of a log that cannot be written, as on a full disk: the error that follows is one line
        logging.raiseExceptions = debug
        expand(vars(args))
        action(args)
        if sys.stdout is not None:  # as where a shell has closed it
            sys.stdout.flush()
    except KeyboardInterrupt:  # of a training under way `StopSignals` takes care
        if debug:
            raise
        print('SIGINT: stopped', file=sys.stderr)
        end_by(signal.SIGINT)
    except Exception as error:
        if isinstance(error, BrokenPipeError):
            _end_if_nobody_reads()
        if debug:
            raise
        rank, cause = error.args if isinstance(error, RankError) else (None, error)
        where = '' if rank is None else f'rank {rank}: '
        sys.exit(printable(f'error: {where}{as_typed(one_line(cause), options)}'))


def _end_if_nobody_reads() -> None:
    """Ends like any program of a shell where `| head` has seen enough of what it prints."""
    with suppress(TypeError, OSError):  # there is none, or it is no file
        poll = select.poll()
        poll.register(sys.stdout, 0)  # what ends a pipe is always told
        if poll.poll(0):
            # the interpreter would try to write the rest
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            end_by(signal.SIGPIPE)


def as_typed(message: str, options: Mapping[str, Any]) -> str:
    """Names the field that a message begins with as the command line did: model.moe.top_k."""
    field = message.partition('=')[0]
    names = [name for name in options if name.endswith(f'.{field}')]
    # of several fields of this name that with the value in question
    names.sort(key=lambda name: not message.startswith(f'{field}={options[name]!r} '))
    return message.replace(field, names[0], 1) if names else message


def one_line(error: BaseException) -> str:
    """What went wrong in one line, without the frames and prefixes that frameworks add."""
    # mmengine hides the reason behind advice about PYTHONPATH, and that behind "Failed to import"
    while isinstance(error, ImportError):
        hidden = error.__cause__ if error.__suppress_context__ else error.__context__
        if not isinstance(hidden, ImportError):
            break
        error = hidden
    full = getattr(error, 'errno', None) in (ENOSPC, EDQUOT, EFBIG)
    if isinstance(error, OSError) and full and error.filename is None:
        # of a log, which does not name its file; checkpoints do
        return f'{error.strerror}: free some space; the checkpoints in the work dir are intact'
    if isinstance(error, UnpicklingError):
        return 'the checkpoint is damaged, or holds more than weights and is not loaded'
    message = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    if 'Original Traceback' in message:  # a data loader's worker: the reason is the last line
        return re.sub(r'^[\w.]*(Error|Exception): ', '', lines[-1])
    # mmengine up to 0.10 writes "class `X` in x.py: " once for every level of the config
    text = re.sub(r'(class `\w+` in [\w/]+\.py: )+', '', ' '.join(lines))
    return text if isinstance(error, _USER_ERRORS) else f'{type(error).__name__}: {text}'
