"""Numbers that no cut may change: losses of steps, states, saved models and their answers.

    python -m tests.golden.test_numbers --write

writes the numbers in `data`, and models in `data/saved` that are not there; the tests read only
what is checked in. Dispatch against naive loops, with all gradients, is tests/moe/test_dispatch.py
(`test_float64_equals_the_naive_loops` and its like), and what the code of the methods' authors
answers is tests/moe/test_recorded.py.
"""

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.models import save_for_hf
from torch import nn

from .. import on_meta
from . import probe

DATA = Path(__file__).parent / 'data'
SHIPPED = ('test_vit_vqmoe', 'test_vit_dense')
TASKS = {
    'classification': (probe.create, probe.classify, 6),
    'segmentation': (probe.segmentor, probe.segment, 3),
}

# Of a record's largest number. Models compute in float64, but routers, codebooks and their losses
# in float32 whatever the model's type, with errors of 6e-8 in each operation. Another processor has
# other errors: without AVX, as ATEN_CPU_CAPABILITY=default and the variables of MKL and oneDNN have
# it, three steps of a classifier move by up to 5e-6 (VQMoE; 2e-6 without it) and those of a
# segmentor by 1.3e-6 (1.8e-5 on a Xeon with AMX), and answers of given weights by 4e-9.
TRAINED, GIVEN = {'classification': 5e-5, 'segmentation': 3e-5}, 1e-6

# Of the saved files: options that are not the defaults, and sizes by which the files stay small.
SAVED: dict[str, dict[str, Any]] = {
    'smoe': {'preset': 'group'},
    'xmoe': {'gate': 'sigmoid', 'top_k': 2},
    'stablemoe': {'stage1_steps': 1},
    'softmoe': {'slots_per_expert': 3},
    'vqmoe': {**probe.EMA, 'num_codes': 6, 'code_share': 0.3, 'output_norm': True},
    'ecmoe': {'capacity_factor': 1.0},
    'hashmoe': {'preset': 'paper'},  # a hash more would be 33 KB more
    'mocle': {'num_clusters': 8},
    'tgrmoe': {'num_shared_experts': 1, 'top_k': 1, 'score': 'sigmoid'},
}
SMALL: dict[str, Any] = {'img_size': 8, 'patch_size': 2, 'embed_dim': 8, 'num_heads': 2}
SMALL |= {'moe_layers': (1,), 'num_experts': 3, 'mlp_ratio': 1.0, 'expert_mlp_ratio': 0.5}


def read(name: str) -> Any:
    return json.loads((DATA / f'{name}.json').read_text())


def steps(task: str, variant: str) -> dict[str, list[float]]:
    """Losses of each step by name, and the sums of answers and of their squares after the last."""
    make, losses_of, number = TASKS[task]
    method, options = probe.variants()[variant]
    images = probe.waves(number, 16)
    torch.set_default_dtype(torch.float64)
    try:
        model = make(method, **options)
        probe.enlarge(model)
        each = list(probe.train(model, losses_of, images))
        with torch.no_grad():
            answers = model.eval()(images)
    finally:
        torch.set_default_dtype(torch.float32)
    found: dict[str, list[float]] = {}
    for name, value in (item for losses in each for item in losses.items()):
        found.setdefault(name, []).append(value.item())
    return found | {'answers': [answers.sum().item(), answers.square().sum().item()]}


def states() -> dict[str, Any]:
    """Of every entry point and variant a digest; all names of one small model of each method."""
    with on_meta():
        shapes = {name: probe.shapes(timm.create_model(name)) for name in probe.entry_points()}
    for name, (method, options) in probe.variants().items():
        shapes[name] = probe.shapes(probe.create(method, **options))
    texts = {name: json.dumps(state).encode() for name, state in shapes.items()}
    digests = {name: hashlib.sha256(text).hexdigest()[:16] for name, text in texts.items()}
    return {method: shapes[f'{method}-paper'] for method in SAVED} | {'digests': digests}


@torch.no_grad()
def answers_of(model: nn.Module, number: int, size: int) -> list[list[float]]:
    """Logits of images by a formula."""
    return model.eval().double()(probe.waves(number, size)).tolist()


def close(found: Any, expected: Any, tolerance: float, what: str) -> None:
    ours, theirs = (torch.tensor(each, dtype=torch.float64) for each in (found, expected))
    allowed = tolerance * theirs.abs().max().item()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=allowed, msg=lambda t: f'{what}: {t}')


@pytest.mark.parametrize('variant', probe.variants())
@pytest.mark.parametrize('task', TASKS)
def test_losses_of_three_steps(task, variant):
    recorded, found = read(task)[variant], steps(task, variant)
    assert found.keys() == recorded.keys()
    for name, values in recorded.items():
        close(found[name], values, TRAINED[task], name)


def test_names_and_shapes_of_every_entry_point_and_of_small_models():
    recorded, found = read('states'), states()
    digests = recorded.pop('digests')
    assert {name: found['digests'].get(name) for name in digests} == digests
    assert {method: found[method] for method in recorded} == recorded


@pytest.mark.parametrize('method', SAVED)
def test_a_saved_model_loads_and_answers(method):
    """As a folder that says what it is of, and as weights for a model that is asked for by name."""
    folder, recorded = DATA / 'saved' / method, read('answers')[method]
    described = timm.create_model(f'local-dir:{folder}', pretrained=True)
    close(answers_of(described, 4, 8), recorded, GIVEN, 'folder')
    weights = str(folder / 'model.safetensors')
    asked = probe.create(method, **SMALL, **SAVED[method], checkpoint_path=weights)
    close(answers_of(asked, 4, 8), recorded, GIVEN, 'weights')


def maps_of_a_run() -> list[list[float]]:
    """Means of the maps of a segmentor that starts from the checkpoint of a classifier's run."""
    checkpoint = str(DATA / 'saved/run.pth')
    model = probe.segmentor('vqmoe', **SMALL, **SAVED['vqmoe'], checkpoint=checkpoint)
    model.init_weights()
    with torch.no_grad():
        (maps,) = model.backbone.eval().double()(probe.waves(4, 8))
    return maps.flatten(2).mean(2).tolist()


def test_a_checkpoint_of_a_run_starts_a_segmentor():
    close(maps_of_a_run(), read('answers')['run.pth'], GIVEN, 'maps')


@pytest.mark.parametrize('name', SHIPPED)
def test_the_shipped_models_answer_as_they_did(name):
    found = answers_of(timm.create_model(name, pretrained=True), 100, 32)
    close(found, read('answers')[name], GIVEN, 'logits')


def write_saved(method: str) -> None:
    """Trains a model for some steps, and writes it as timm does, and one as a run does."""
    model = probe.create(method, **SMALL, **SAVED[method])
    probe.enlarge(model)
    list(probe.train(model, probe.classify, probe.waves(6, 8).float()))
    save_for_hf(model, str(DATA / 'saved' / method), safe_serialization=True)
    if method == 'vqmoe':
        state = {f'model.{name}': value for name, value in model.state_dict().items()}
        torch.save({'meta': {'epoch': 3}, 'state_dict': state}, DATA / 'saved/run.pth')


def write_all() -> None:
    """Writes all data anew, but no file of weights that is there: it would be none of before."""
    for task in TASKS:
        found = {variant: steps(task, variant) for variant in probe.variants()}
        probe.write(DATA / f'{task}.json', found)
    probe.write(DATA / 'states.json', states())
    places = {}
    for method in SAVED:
        if not (DATA / 'saved' / method).is_dir():
            write_saved(method)
        places[method] = f'local-dir:{DATA}/saved/{method}', 4, 8
    places |= {name: (name, 100, 32) for name in SHIPPED}
    answers = {
        name: answers_of(timm.create_model(place, pretrained=True), *images)
        for name, (place, *images) in places.items()
    }
    probe.write(DATA / 'answers.json', {**answers, 'run.pth': maps_of_a_run()})


if __name__ == '__main__':
    if sys.argv[1:] != ['--write']:
        sys.exit(__doc__)
    torch.set_num_threads(1)  # as the tests do
    write_all()
