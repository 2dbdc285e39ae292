"""The model card of published weights: usage, data, command, numbers and licence."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from mmengine.config import Config

from vqmoe_vision.models.weights import is_file_name
from vqmoe_vision.provenance import commit, installed

_TEMPLATE = Path(__file__).parent / 'templates/model_card.md'
_PACKAGES = ('vqmoe-vision', 'torch', 'timm', 'onedl-mmengine', 'onedl-mmsegmentation')
# by whether the model has a head
_TASKS = {True: 'image-classification', False: 'image-feature-extraction'}
_LOADERS = {'training': 'train', 'validation': 'val', 'test': 'test'}


@dataclass(frozen=True)
class Score:
    """A number that a run has measured."""

    use: str
    metric: str
    value: float


def write_card(
    folder: Path,
    name: str,
    model: Any,
    config: Config,
    scores: Sequence[Score],
    license_id: str | None,
    **values: Any,
) -> None:
    """Writes `README.md`."""
    method = getattr(model, 'method', None)
    data = _data(config)
    results = _results(scores, data)
    card = ModelCard.from_template(
        _metadata(name, model.num_classes, method, results, license_id),
        template_path=str(_TEMPLATE),
        name=name,
        architecture=model.pretrained_cfg['architecture'],
        classes=model.num_classes,
        method=method,
        preprocessing=model.pretrained_cfg,
        data=data,
        started_from=_sources(config),
        scores=[asdict(score) for score in scores],
        license=license_id,
        versions=_versions(),
        **{**values, 'arguments': json.dumps(values['arguments'], indent=2)},
    )
    card.save(folder / 'README.md')


def _metadata(
    name: str,
    classes: int,
    method: str | None,
    results: list[EvalResult],
    license_id: str | None,
) -> ModelCardData:
    task = _TASKS[bool(classes)]
    found = results if classes and results else None
    return ModelCardData(
        library_name='timm',
        pipeline_tag=task,
        tags=[task, 'timm', *(['mixture-of-experts', method] if method else [])],
        license=license_id,
        model_name=name if found else None,
        eval_results=found,
    )


def _results(scores: Sequence[Score], data: dict[str, dict[str, Any]]) -> list[EvalResult]:
    return [
        EvalResult(
            task_type=_TASKS[True],
            dataset_type=str(data[score.use]['type']),
            dataset_name=str(data[score.use]['type']),
            dataset_split=data[score.use]['split'],
            metric_type=score.metric,
            metric_value=score.value,
        )
        for score in scores
        if score.use in data
    ]


def _data(config: Config) -> dict[str, dict[str, Any]]:
    found = {}
    for use, name in _LOADERS.items():
        dataset = (config.get(f'{name}_dataloader') or {}).get('dataset') or {}
        if 'type' in dataset:
            found[use] = {'type': dataset['type'], 'split': dataset.get('split')}
    return found


def _sources(config: Config) -> list[str]:
    """What a training started from; of files the name alone, for folders are the writer's own."""
    parts: list[Mapping[str, Any]] = [config.model, config.model.get('backbone') or {}]
    named = [config.get('load_from')]
    for part in parts:
        named += [part.get(name) for name in ('checkpoint', 'checkpoint_path', 'features')]
        named.append(part.get('upcycle'))
        file = (part.get('pretrained_cfg_overlay') or {}).get('file')
        if part.get('pretrained'):
            named.append(file or f"timm's weights of {part.get('model_name')}")
    return [_without_folder(str(name)) for name in named if name]


def _without_folder(source: str) -> str:
    """A source as others may read it: of a path on this machine the last part alone."""
    if '://' in source:
        return source
    scheme, colon, path = source.rpartition('local-dir:')
    of_files = colon or path[:1] in '/.~' or is_file_name(path) or Path(path).exists()
    return scheme + colon + (Path(path).name if of_files else path)


def _versions() -> list[str]:
    known = {package: installed(package) for package in _PACKAGES}
    now = commit()
    at = {'vqmoe-vision': f' (commit {now})'} if now else {}
    return [f'{name} {version}{at.get(name, "")}' for name, version in known.items() if version]
