import math

import pytest
import torch

from vqmoe_vision.engine import RoutingStatistics
from vqmoe_vision.engine.routing import lines_of


def test_an_expert_that_one_batch_does_not_use_is_not_unused() -> None:
    statistics = RoutingStatistics()
    statistics.add({'a/load': torch.tensor([1.0, 0.0, 0.0])})
    statistics.add({'a/load': torch.tensor([0.5, 0.5, 0.0])})
    # means 0.75, 0.25, 0; entropy 0.75 ln(4 / 3) + 0.25 ln 4 = 0.5623, e^0.5623 = 1.7548
    assert statistics.summary() == {
        'a/load_min': 0.0,
        'a/load_max': 0.75,
        'a/load_unused': 1,
        'a/load_perplexity': pytest.approx(1.7548, abs=1e-4),
    }


def test_code_perplexity_is_that_of_the_whole_pass() -> None:
    statistics = RoutingStatistics()
    # each batch uses one code (perplexity 1), both together two codes equally (perplexity 2)
    statistics.add({'a/code_usage': torch.tensor([1.0, 0.0, 0.0])})
    statistics.add({'a/code_usage': torch.tensor([0.0, 1.0, 0.0])})
    summary = statistics.summary()
    assert summary['a/code_usage_perplexity'] == pytest.approx(2)
    assert summary['a/code_usage_unused'] == 1


def test_every_statistic_of_a_layer_is_averaged_and_reported() -> None:
    statistics = RoutingStatistics()
    share = torch.tensor([0.25, 0.75])
    statistics.add({'a/load': share, 'a/new': torch.tensor(0.5), 'a/none': torch.tensor(0.0)})
    statistics.add({'a/load': share, 'a/new': torch.tensor(1.0), 'b/load': share})
    assert statistics.summary()['a/new'] == 0.75
    assert statistics.summary()['b/load_max'] == 0.75
    perplexity = math.exp(-0.25 * math.log(0.25) - 0.75 * math.log(0.75))
    load = f'load 0.250..0.750 perplexity {perplexity:.2f} unused 0/2'
    assert lines_of(statistics.means()) == [f'a  {load}  new 0.75', f'b  {load}']


def test_values_that_are_not_finite_are_left_out() -> None:
    statistics = RoutingStatistics()
    statistics.add({'a/error': torch.tensor(0.5), 'a/bad': torch.tensor(torch.nan)})
    statistics.add({'a/error': torch.tensor(torch.inf), 'a/bad': torch.tensor(torch.nan)})
    statistics.add({'a/error': torch.tensor(1.0), 'a/bad': torch.tensor(torch.nan)})
    assert statistics.summary() == {'a/error': 0.75, 'a/bad': 0.0}


def test_reset_forgets() -> None:
    statistics = RoutingStatistics()
    statistics.add({'a/load': torch.ones(2) / 2})
    statistics.reset()
    assert statistics.summary() == {}
