"""What a table says of the routing that was measured."""

import math
from typing import Any

import pytest
from imagecorruptions import get_corruption_names

from vqmoe_vision.comparison.measured import expanded, routing_numbers

NUMBERS = {
    'effective_rank_before': 10.0,
    'effective_rank_after': 5.0,
    'similarity_outputs': 0.5,
    'router/load_entropy': 0.9,
    'router/normalized_mutual_information': 0.1,
}


def measured() -> dict[str, Any]:
    """Two layers, of which chance would change 80 % and 50 %."""
    layers = {
        'a': {**NUMBERS, 'router/changed_by_chance': 0.8},
        'b': {**NUMBERS, 'router/changed_by_chance': 0.5},
    }
    shifts = {'flip': {'a.router': 0.8, 'b.router': 0.5}, 'fog 3': {'a.router': 0, 'b.router': 0.0}}
    changes = [{'a.router': 0.4, 'b.router': 0.4}, {'a.router': 0.2, 'b.router': 0.1}]
    return {'layers': layers, 'shifts': shifts, 'changes': changes}


def test_what_stays_is_counted_beyond_chance() -> None:
    numbers = dict(routing_numbers(measured()))
    # 1 - 0.2 / 0.8 = 0.75 and 1 - 0.1 / 0.5 = 0.8
    assert numbers['router/kept since the checkpoint before'] == pytest.approx(0.775)
    assert numbers['router/kept when mirrored'] == pytest.approx(0)  # as if chance decided anew
    assert numbers['router/kept when corrupted'] == 1
    assert numbers['router/after'] == 5


def test_a_run_with_one_checkpoint_and_one_expert() -> None:
    routing = {**measured(), 'changes': []}
    numbers = dict(routing_numbers(routing))
    assert math.isnan(numbers['router/kept since the checkpoint before'])
    for layer in routing['layers'].values():
        layer['router/changed_by_chance'] = 0.0  # a collapsed layer: nothing can change
    assert math.isnan(dict(routing_numbers(routing))['router/kept when mirrored'])


def test_a_corruption_stands_for_all_fifteen() -> None:
    tests = expanded('test_dataloader.dataset.transform.shift={corruption}_3')
    names = get_corruption_names('common')
    assert tests == [f'test_dataloader.dataset.transform.shift={name}_3' for name in names]
    assert len(set(tests)) == 15 and 'test_dataloader.dataset.transform.shift=fog_3' in tests
    assert expanded('model.img_size=64') == ['model.img_size=64']
