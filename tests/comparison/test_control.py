"""The control: its tokens are what they are said to be, its rows follow the table, and it sees."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from vqmoe_vision.comparison import control
from vqmoe_vision.comparison.control import Row, Source, all_rows, find_rows
from vqmoe_vision.comparison.scenes import SCENES, Scenes
from vqmoe_vision.moe.routing import Router

ROOT = Path(__file__).parents[2]


def test_clusters_stand_at_right_angles_and_each_has_its_own_labels():
    source = Source(2.0, 1)
    basis = torch.cat([source.directions, source.others])
    torch.testing.assert_close(basis @ basis.T, torch.eye(64), atol=1e-5, rtol=0)
    torch.testing.assert_close(source.matrices.mean(0), torch.zeros(4, 16), atol=1e-6, rtol=0)
    tokens, clusters, labels = (value.flatten(0, 1) for value in source.draw())
    along = tokens @ source.directions.T
    torch.testing.assert_close(along, 2.0 * nn.functional.one_hot(clusters, 8), atol=1e-5, rtol=0)
    nuisance = tokens @ source.others.T
    assert nuisance.std().item() == pytest.approx(1, abs=0.02)  # of 57,344 numbers
    answers = [source.matrices[k] @ z[:16] for k, z in zip(clusters, nuisance, strict=True)]
    # rounding may turn two labels that are all but equal
    assert (torch.stack(answers).argmax(1) == labels).float().mean() > 0.99
    shares = labels.bincount() / len(labels)
    assert shares.sub(0.25).abs().max() < 0.06


@pytest.mark.parametrize('name', control.GENERATORS)
def test_a_generator_has_the_clusters_that_its_layout_says(name):
    layout = control.GENERATORS[name]
    source = Source(3.0, 1, layout)
    cosines = source.directions @ source.directions.T
    expected = torch.full((layout.number, layout.number), layout.cosine).fill_diagonal_(1)
    torch.testing.assert_close(cosines, expected, atol=1e-5, rtol=0)
    assert (source.directions @ source.others.T).abs().max() < 1e-5
    tokens, clusters, _ = (value.flatten(0, 1) for value in source.draw())
    shares = clusters.bincount(minlength=layout.number) / len(clusters)
    # 1, r, r^2, ...; five standard deviations of a share of 1,024 tokens are at most 0.08
    expected = layout.size_ratio ** torch.arange(layout.number)
    torch.testing.assert_close(shares, expected / expected.sum(), atol=0.08, rtol=0)
    projections = tokens @ torch.linalg.pinv(source.directions)
    offsets = projections - 3 * nn.functional.one_hot(clusters, layout.number)
    assert offsets.std().item() == pytest.approx(layout.noise, rel=0.1, abs=1e-5)


def test_scans_that_are_held_out_are_no_others():
    source = Scenes(2.0, 1)
    before = source.scans
    source.hold_out()
    assert len(before) == 1257 and len(source.scans) == 360  # of 1,797; the rest is for choices
    apart = torch.cdist(source.scans, before, compute_mode='donot_use_mm_for_euclid_dist')
    assert apart.min() > 0


@pytest.mark.parametrize('of', [control.PLANTED, SCENES])
def test_every_row_is_trained_and_tells_what_chooses(monkeypatch, of):
    monkeypatch.setattr(control, 'TESTED', 1)
    rows, state = all_rows(), torch.get_rng_state()
    for name, row in rows.items():
        found = control.score(row, 3.0, 1, steps=1, of=of)
        assert 0.4 < found['accuracy'] * of.source.labels / 100 < 2  # of chance
        information, deciders = found['information'], found['deciders']
        chooses = row.method != 'softmoe' and not name.startswith('dense')
        assert (information is not None) == chooses == bool(deciders)
        if row.method == 'vqmoe' and row.config.form == 'full':
            assert deciders.keys() == {'router', 'quantizer.codebook'}
        if name == 'oracle':
            assert information == pytest.approx(math.log(of.source.layout.number), abs=0.05)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_command_leaves_a_table_a_figure_and_scores(says, monkeypatch, tmp_path):
    monkeypatch.setattr(control, 'score', partial(control.score, steps=1))
    monkeypatch.setattr(control, 'TESTED', 1)
    monkeypatch.chdir(tmp_path)
    methods = 'vqmoe', 'smoe', 'dense_1x', 'position'
    said = says('control', '--quick', '--methods', *methods, '--out', 'made/here.json')
    first, _, *lines = said.splitlines()
    assert first.replace(' ', '') == '|row|s=1|s=3|nats,s=1|nats,s=3|'
    cells = [[cell.strip() for cell in line.split('|')[1:-1]] for line in lines[:4]]
    names = ['vqmoe (router / quantizer.codebook)', 'smoe', 'dense_1x', 'position']
    assert [row[0] for row in cells] == names
    assert cells[2][3:] == ['', ''] and ' / ' in cells[0][3]
    assert said.endswith('made/here.png\n') and Path('made/here.png').stat().st_size > 10_000
    rows = json.loads(Path('made/here.json').read_text())['rows']
    assert len(rows) == 8
    fields = {'generator', 'row', 'separation', 'seed', 'accuracy', 'information', 'deciders'}
    assert all(row.keys() == fields for row in rows)
    assert said.startswith(control.table_of(rows))
    names = 'clusters_16', 'sizes_0.75'
    said = says('control', '--quick', '--methods', 'smoe', '--generator', *names)
    first, _, *lines = said.splitlines()
    assert first.replace(' ', '').startswith('|generator|row|s=1|')
    assert [line.split('|')[1].strip() for line in lines[:2]] == [*names]
    for flags in (
        ['--separation', 'inf'], ['--seeds', '-1'], ['--methods', 'smoo'],
        ['--generator', 'clusters_7'], ['--generator', 'clusters_5', '--images'],
    ):  # fmt: skip
        assert says('control', *flags).startswith(f'error: {flags[0]}')


def test_the_table_of_the_documents_is_that_of_the_scores():
    rows = json.loads((ROOT / 'docs/results/control.json').read_text())['rows']
    table = control.table_of(rows)
    assert table in (ROOT / 'docs/results/tables/control.md').read_text()


def accuracy(name: str, *seeds: int, bed: type[control.Bed] = control.Bed) -> float:
    (row,), of = find_rows([name]), control.Structure(bed=bed)
    return sum(control.score(row, 3.0, seed, of=of)['accuracy'] for seed in seeds) / len(seeds)


def not_trained(layer: nn.Module) -> None:
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_(name.startswith('experts'))
    still = {'apply_updates': staticmethod(lambda layers: [False] * len(layers))}
    layer.__class__ = type('Still', (type(layer),), still)


def wrong_index(layer: nn.Module) -> None:
    for name, module in layer.named_modules():
        if isinstance(module, Router) or name == 'quantizer.codebook':
            module.register_forward_hook(
                lambda _, inputs, told: replace(told, indices=told.indices.roll(1, 0))
            )


@pytest.mark.long
@pytest.mark.timeout(1200)  # two minutes of one core, on a machine that may be busy
def test_learned_routers_find_clusters_and_broken_ones_fall_out():
    bar, best = accuracy('frozen', 1, 2) + 10, accuracy('oracle', 1, 2) + 0.3
    for name in ('smoe', 'xmoe', 'vqmoe', 'vqmoe_discrete'):
        # codes reach it; of 32,768 tokens 98 % are right to within 0.1 points
        assert bar < accuracy(name, 1, 2) < best, name
        for fault in (not_trained, wrong_index):

            class Broken(control.Bed):
                def __init__(self, row: Row, fault: Callable = fault) -> None:
                    super().__init__(row)
                    fault(self.layer)

            assert accuracy(name, 1, bed=Broken) < bar, (name, fault)
