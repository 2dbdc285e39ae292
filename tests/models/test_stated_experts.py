"""Experts whose tensors have the names of the model's, and which are those of another function."""

import argparse
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.models import save_for_hf
from timm.utils import CheckpointSaver

from vqmoe_vision.engine.checkpoint import start_from
from vqmoe_vision.models.compat import STATED, Network, compare, state_network
from vqmoe_vision.models.create import create_model
from vqmoe_vision.models.weights import network_of
from vqmoe_vision.moe import METHODS

from ..variants import trials
from .conftest import TINY, distance, make, shaken

# as a training of each method and form has them
FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in METHODS},
    **{f'vqmoe-{form}': ('vqmoe', {'form': form}) for form in ('discrete', 'continuous')},
}
PAIRS = [pair for pair in permutations(FORMS, 2) if FORMS[pair[0]][0] != FORMS[pair[1]][0]]
OPTIONS = {
    f'{name}-{option}={value!r}': (name, {option: value})
    for name, method in METHODS.items()
    for options in (*method.config.PRESETS.values(), *trials(method.config).values())
    for option, value in options.items()
}


def run_of(model: Any, path: Path, stated: Any) -> str:
    """What a run leaves, as far as it says what its experts are."""
    torch.save({'state_dict': model.state_dict(), 'meta': {STATED: stated}}, path)
    return str(path)


@pytest.fixture(scope='module')
def folders(tmp_path_factory) -> dict[str, Path]:
    made = {}
    for form, (method, options) in FORMS.items():
        made[form] = tmp_path_factory.mktemp('saved') / form
        model = make(method, depth=2, **options)
        arguments = {**TINY, 'depth': 2, **options}
        save_for_hf(model, made[form], model_args=arguments, safe_serialization=True)
    return made


@pytest.mark.parametrize('theirs, ours', PAIRS)
def test_experts_of_another_method_are_refused(theirs, ours, folders):
    method, options = FORMS[ours]
    message = f"saved with method='{FORMS[theirs][0]}', the model has method='{method}'"
    with pytest.raises(ValueError, match=message):
        make(method, depth=2, upcycle=f'local-dir:{folders[theirs]}', **options)


@pytest.mark.parametrize('way', ['checkpoint', 'checkpoint_path', 'upcycle'])
def test_a_run_says_it_as_values(way, tmp_path):
    source = make('smoe', renormalize=True)
    path = run_of(source, tmp_path / 'a.pth', state_network(source))
    found, own = network_of(path), Network.of(source)
    assert found is not None
    assert (found.facts, found.options, found.img_size) == (own.facts, own.options, own.img_size)

    def load(method: str) -> None:
        if way == 'checkpoint':
            start_from(make(method), path)
        else:
            create_model(f'vit_tiny_{method}', **TINY, **{way: path})

    load('smoe')
    with pytest.raises(ValueError, match="method='smoe', the model"):
        load('ecmoe')


@pytest.mark.parametrize(
    'stated',
    [None, 7, {'method': None, 'options': None}, {'method': 'moe_of_tomorrow'}, {'method': [1]}],
)
def test_what_says_nothing_is_not_refused(stated, tmp_path):
    path = run_of(make('smoe'), tmp_path / 'a.pth', stated)
    model: Any = create_model('vit_tiny_ecmoe', **TINY, upcycle=path)
    assert not model.weights_report.warnings


@pytest.mark.parametrize('case', OPTIONS)
def test_an_option_is_told_if_answers_follow_it(case, images):
    method, options = OPTIONS[case]
    source = shaken(make(method))
    try:
        model: Any = make(method, **options).eval()
        model.load_state_dict(source.state_dict())
    except (ValueError, RuntimeError):  # not alone, or tensors show it
        return
    with torch.no_grad():
        changed = distance(model(images), source(images)) > 1e-5
    (name,) = options
    lines = compare(model, Network.of(source), 'a')
    by_tensors = name == 'form'  # the full form's are those of the discrete one and more
    assert bool(lines) == (changed and not by_tensors)
    if lines:
        (line,) = lines
        before, after = (getattr(x.moe_config, name) for x in (source, model))
        assert f'trained with {name}={before!r}, the model has {name}={after!r}' in line


def left_by_timm(model: Any, folder: Path, name: str, **others: Any) -> str:
    """What timm's train.py leaves, with the arguments that it was called with."""
    folder.mkdir()
    optimizer = torch.optim.SGD(model.parameters())
    places = dict(checkpoint_dir=str(folder), recovery_dir=str(folder))
    args = argparse.Namespace(lr=0.1, model=name, **others)
    CheckpointSaver(model, optimizer, args, **places).save_checkpoint(0, metric=1.0)
    return str(folder / 'last.pth.tar')


@pytest.mark.parametrize('theirs', METHODS)
def test_a_checkpoint_of_timms_script_says_its_method(theirs, tmp_path):
    ours = 'ecmoe' if theirs == 'smoe' else 'smoe'  # of the same tensors, where any two are
    model, script = make(theirs, num_experts=4), {'model_kwargs': {'num_experts': 4}}
    path = left_by_timm(model, tmp_path / 'out', f'vit_tiny_{theirs}', **script)
    with pytest.raises(ValueError, match=f"method='{theirs}', the model has method='{ours}'"):
        make(ours, num_experts=4, upcycle=path)
    again: Any = make(theirs, num_experts=4, upcycle=path)
    assert again.weights_report.warnings == () and not again.weights_report.initialised
