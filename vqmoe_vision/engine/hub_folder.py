"""A run's model as the folder that timm reads and the Hugging Face hub takes."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from mmengine.config import Config

from vqmoe_vision.models.saved import save
from vqmoe_vision.moe import moe_layers
from vqmoe_vision.moe.config import check

from .checkpoint import read_content
from .checkpoint_files import BEST, POINTER, last_checkpoint
from .cli import load_config, make_folder
from .model_card import Score, write_card
from .numbers import read_numbers
from .trained import load_trained

# What mmengine logs beside the metrics of a validation.
_NO_METRICS = ('data_time', 'time')
# Of a config what is about the machine of the run.
_OF_THE_MACHINE = ('work_dir', 'resume', 'launcher')


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
    if not isinstance(content, dict) or not isinstance(content.get('meta'), dict):
        raise ValueError(f"checkpoint {str(file)!r} has no 'meta' of a training")
    tested = read_numbers(numbers, model, file) if numbers else {}
    with written_whole(target) as folder:
        arguments = _write_model(model, config, content, folder, license_id)
        shared = Config({k: v for k, v in config.items() if k not in _OF_THE_MACHINE})
        shared.dump(folder / config_file.name)
        best = _validated(content) if file.name.startswith(BEST) else {}
        scores = _scores(model, {'validation': best, 'test': tested})
        record = content.get('run_record') or [None, []]
        write_card(
            folder, target.name, model.routed_model, config, scores, license_id,
            arguments=arguments, config_name=config_file.name, checkpoint=file.name,
            meta=content['meta'], commits=[c for c in record[1] if c],
            chosen='validation' if best else None,
        )  # fmt: skip
    return target


def free_folder(out: str) -> Path:
    """Where a folder is to be written."""
    target = Path(out).resolve()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f'out={out!r} exists: name a folder that does not, nothing is overwritten')
    return target


@contextmanager
def written_whole(target: Path) -> Iterator[Path]:
    """A folder to write to, which gets its name when all is in it, and is gone after an error."""
    make_folder(target.parent)
    with TemporaryDirectory(dir=target.parent, prefix=f'.{target.name}.') as scratch:
        folder = Path(scratch) / target.name
        folder.mkdir()
        yield folder
        _open_to_others(folder)
        os.replace(folder, target)


def _open_to_others(folder: Path) -> None:
    """Gives files the rights that the umask says: safetensors writes for its owner alone."""
    mask = os.umask(0o077)  # there is no other way to read it
    os.umask(mask)
    for path in folder.rglob('*'):
        if path.is_file():
            path.chmod(0o666 & ~mask)


def _write_model(
    model: Any, config: Config, content: dict[str, Any], folder: Path, license_id: str | None
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
    classes = (content['meta'].get('dataset_meta') or {}).get('classes') or ()
    names = classes if len(classes) == timms.num_classes else ()
    return save(timms, folder, preprocessing, names, license_id)


def _scores(model: Any, measured: dict[str, dict[str, float]]) -> list[Score]:
    layers = tuple(f'{name}/' for name in moe_layers(model.routed_model))
    return [
        Score(use, name, value)
        for use, values in measured.items()
        for name, value in values.items()
        if not name.startswith(layers)
    ]


def config_of(run: Path) -> Path:
    """The config that a run left in its work dir."""
    found = sorted(run.glob('*.py'))
    if len(found) == 1:
        return found[0]
    names = ', '.join(path.name for path in found) or 'none'
    raise ValueError(
        f'work dir {str(run)!r} must hold one config, as tools/train.py leaves it: it has {names}'
    )


def chosen_checkpoint(run: Path, how: str = 'name one of them after the work dir') -> Path:
    """The best checkpoint of a work dir, or else the last."""
    best = sorted(run.glob(f'{BEST}*.pth'))
    if len(best) > 1:
        names = ', '.join(path.name for path in best)
        raise ValueError(f'work dir {str(run)!r} has {names}: {how}')
    if best:
        return best[0]
    if not (run / POINTER).is_file() or not last_checkpoint(run).is_file():
        raise ValueError(f'work dir {str(run)!r} has no checkpoint of a training')
    return last_checkpoint(run)


def _validated(content: dict[str, Any]) -> dict[str, float]:
    """Metrics of the validation after which the best checkpoint was written."""
    logged = (content.get('message_hub') or {}).get('log_scalars') or {}
    values = {n.removeprefix('val/'): v for n, v in logged.items() if n.startswith('val/')}
    return {n: float(v.current()) for n, v in values.items() if n not in _NO_METRICS}
