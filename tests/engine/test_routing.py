import math

import pytest
import torch

from vqmoe_vision.engine import RoutingStatistics


def test_expert_unused_in_one_batch_is_not_dead() -> None:
    statistics = RoutingStatistics()
    statistics.add({'a/load': torch.tensor([1.0, 0.0, 0.0])})
    statistics.add({'a/load': torch.tensor([0.5, 0.5, 0.0])})
    # sums 1.5, 0.5, 0 of 2
    assert statistics.summary() == {
        'a/load_min': 0.0,
        'a/load_max': 0.75,
        'a/dead_experts': 1,
    }


def test_expert_that_only_codes_reach_is_not_dead() -> None:
    statistics = RoutingStatistics()
    router, codes = torch.tensor([1.0, 0.0, 0.0]), torch.tensor([0.5, 0.5, 0.0])
    statistics.add({'a/load': router, 'a/discrete_load': codes, 'b/discrete_load': codes})
    summary = statistics.summary()
    # a: 1.5, 0.5, 0 of 2; b has no router
    assert (summary['a/load_max'], summary['a/dead_experts']) == (0.75, 1)
    assert (summary['b/load_max'], summary['b/dead_experts']) == (0.5, 1)


def test_code_perplexity_is_that_of_the_whole_pass() -> None:
    statistics = RoutingStatistics()
    # each batch uses one code (perplexity 1), both together two codes equally (perplexity 2)
    statistics.add({'a/code_usage': torch.tensor([1.0, 0.0, 0.0])})
    statistics.add({'a/code_usage': torch.tensor([0.0, 1.0, 0.0])})
    summary = statistics.summary()
    assert summary['a/code_perplexity'] == pytest.approx(2)
    assert summary['a/codes_used'] == 2


def test_report_has_one_line_per_layer() -> None:
    statistics = RoutingStatistics()
    share = torch.tensor([0.25, 0.75])
    statistics.add({'a/load': share, 'a/code_usage': share, 'b/load': share})
    perplexity = math.exp(-0.25 * math.log(0.25) - 0.75 * math.log(0.75))
    assert statistics.report() == [
        f'a  load 0.250..0.750  dead experts 0/2  code perplexity {perplexity:.2f}  codes used 2/2',
        'b  load 0.250..0.750  dead experts 0/2',
    ]


def test_reset_forgets() -> None:
    statistics = RoutingStatistics()
    statistics.add({'a/load': torch.ones(2) / 2})
    statistics.reset()
    assert statistics.summary() == {}
