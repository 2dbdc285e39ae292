"""From end to end with the programs of the repository: a run and its row."""

import json
import math
from base64 import b64decode
from typing import Any

import numpy as np
import pytest
from imagecorruptions import get_corruption_names

from vqmoe_vision.analysis import shifts as changes
from vqmoe_vision.comparison import measured
from vqmoe_vision.comparison.cli import compare
from vqmoe_vision.comparison.measured import expanded, routing_numbers

SPEC = """
config = 'vqmoe_vision::classification/digits/demo/vit_tiny_vqmoe_demo.py'
metric = 'accuracy/top1'
reference = 'vqmoe_ema'
seeds = [3]
rows = dict(vqmoe_ema='vqmoe_ema')
options = [
    'train_cfg.max_epochs=2', 'train_cfg.val_interval=1', 'param_scheduler.1.end=3',
    'model.depth=2', 'model.embed_dim=24', 'default_hooks.checkpoint.interval=1',
    'default_hooks.checkpoint.max_keep_ckpts=2',
]
shifts = dict(
    unchanged='test_dataloader.batch_size=50',
    zoomed='test_dataloader.dataset.transform.crop_pct=0.3',
)
"""


def test_a_run_leaves_every_number(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    spec, file = tmp_path / 'digits.py', tmp_path / 'rows/digits/vqmoe_ema-seed3.json'
    spec.write_text(SPEC)
    given = [str(spec), '--work-dir', str(tmp_path / 'work'), '--results', str(tmp_path)]
    compare(['run', *given])
    row = json.loads(file.read_text())
    assert row['seed'] == 3 and row['commit'] and row['versions']['torch']
    assert len(row['first_losses']) == 20
    # 1,257 images are 19 batches of 64
    assert [step for step, _ in row['held_out']] == [19, 38]
    assert row['training_loss'][-1][0] == row['iterations'] == 38
    # of the 360 test images, not of the 180 that validation sees
    right = row['test']['accuracy/top1'] * 3.6
    assert right == pytest.approx(round(right), abs=1e-3)
    bits = np.unpackbits(np.frombuffer(b64decode(row['correct']), np.uint8), count=360)
    assert bits.sum() == round(right)
    assert row['test']['blocks.1.mlp/code_usage_perplexity'] >= 1
    record = json.loads(next((tmp_path / 'work').rglob('run.json')).read_text())
    assert record['held_out'][-1][1].keys() == row['test'].keys()
    assert 0 < row['active_params'] < row['params']
    assert min(row[name] for name in ('macs', 'cpu_minutes', 'minutes')) > 0
    assert row['threads'] == 1 and row['device'] in ('cpu', 'cuda') and row['hardware']
    samples = {split: data['samples'] for split, data in row['data'].items()}
    assert samples == {'train': 1257, 'val': 180, 'test': 360}
    compare(['shifts', *given])
    content = json.loads(file.read_text())
    shifts, shifted = content['shifts'], content['shift_routing']
    error = 'blocks.1.mlp/quantization_error'
    assert shifted['unchanged'].keys() == {name for name in row['test'] if '.mlp/' in name}
    # batches count alike, and the last of these is a fifth of the others
    assert shifted['unchanged'][error] == pytest.approx(row['test'][error], rel=1e-2)
    assert shifted['zoomed'][error] > 1.05 * shifted['unchanged'][error]
    assert shifts['unchanged'] == {'test_dataloader.batch_size=50': row['test']['accuracy/top1']}
    # a third of a digit is no digit
    assert shifts['zoomed'].popitem()[1] < row['test']['accuracy/top1'] - 5
    monkeypatch.setattr(measured, 'NUM_IMAGES', 20)
    monkeypatch.setattr(changes, 'CORRUPTIONS', ('fog', 'contrast'))  # some are compiled
    compare(['routing', *given])
    routed = json.loads(file.read_text())['routing']
    assert routed['images'] == 20 and routed['layers'].keys() == {'blocks.1.mlp'}
    assert routed['checkpoints'] == ['epoch_1', 'epoch_2']
    deciders = {'blocks.1.mlp.router', 'blocks.1.mlp.quantizer.codebook'}
    assert [change.keys() for change in routed['changes']] == [deciders]
    assert routed['convergence']['model.blocks.1.mlp.router']['distance'] == [1, 0]
    compare(['table', *given])
    words = ' '.join((tmp_path / 'tables/digits.md').read_text().split())
    assert f'| unchanged | vqmoe_ema | {row["test"]["accuracy/top1"]:.2f}' in words
    assert '| vqmoe_ema | router | 1 ' in words and '| vqmoe_ema | quantizer.codebook | 1 ' in words
    before = file.stat().st_mtime_ns
    compare(['shifts', *given])
    assert file.stat().st_mtime_ns == before
    # trained again elsewhere it has another loss, and its checkpoint is not the row's
    record['training_loss'][-1][1] += 1e-5
    next((tmp_path / 'work').rglob('run.json')).write_text(json.dumps(record))
    capsys.readouterr()
    compare(['routing', *given])
    assert capsys.readouterr().out.strip().endswith('the training of: vqmoe_ema-seed3')


NUMBERS = dict(effective_rank_before=10.0, effective_rank_after=5.0, similarity_outputs=0.5)
NUMBERS |= {'router/load_entropy': 0.9, 'router/normalized_mutual_information': 0.1}


def test_what_stays_is_counted_beyond_chance():
    # of two layers chance would change 80 % and 50 %
    layers = {n: {**NUMBERS, 'router/changed_by_chance': c} for n, c in (('a', 0.8), ('b', 0.5))}
    shifts = {'flip': {'a.router': 0.8, 'b.router': 0.5}, 'fog 3': {'a.router': 0, 'b.router': 0.0}}
    changes = [{'a.router': 0.4, 'b.router': 0.4}, {'a.router': 0.2, 'b.router': 0.1}]
    routing: dict[str, Any] = {'layers': layers, 'shifts': shifts, 'changes': changes}
    numbers = dict(routing_numbers(routing))
    # 1 - 0.2 / 0.8 = 0.75 and 1 - 0.1 / 0.5 = 0.8
    assert numbers['router/kept since the checkpoint before'] == pytest.approx(0.775)
    assert numbers['router/kept when mirrored'] == pytest.approx(0)  # as if chance decided anew
    assert numbers['router/kept when corrupted'] == 1
    assert numbers['router/after'] == 5
    routing['changes'] = []  # one checkpoint
    for layer in layers.values():
        layer['router/changed_by_chance'] = 0.0  # a collapsed layer: nothing can change
    numbers = dict(routing_numbers(routing))
    assert math.isnan(numbers['router/kept since the checkpoint before'])
    assert math.isnan(numbers['router/kept when mirrored'])


def test_a_corruption_stands_for_all_fifteen():
    tests = expanded('test_dataloader.dataset.transform.shift={corruption}_3')
    names = get_corruption_names('common')
    assert tests == [f'test_dataloader.dataset.transform.shift={name}_3' for name in names]
    assert len(set(tests)) == 15 and 'test_dataloader.dataset.transform.shift=fog_3' in tests
    assert expanded('model.img_size=64') == ['model.img_size=64']
