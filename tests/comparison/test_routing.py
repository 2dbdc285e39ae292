"""What a table and a picture say of the routing that was measured."""

import math
from typing import Any

import pytest

from vqmoe_vision.comparison.results import Results
from vqmoe_vision.comparison.routing import by_decider, kept, routing_table
from vqmoe_vision.comparison.routing_figure import plot_routing
from vqmoe_vision.comparison.spec import read_comparison

NUMBERS = {
    'effective_rank_before': 10.0,
    'similarity_outputs': 0.5,
    'router/load_entropy': 0.9,
    'router/normalized_mutual_information': 0.1,
}


def measured(after: float = 5.0) -> dict[str, Any]:
    """Two layers, of which chance would change 80 % and 50 %."""
    layers = {
        'a': {**NUMBERS, 'effective_rank_after': after, 'router/changed_by_chance': 0.8},
        'b': {**NUMBERS, 'effective_rank_after': after, 'router/changed_by_chance': 0.5},
    }
    shifts = {'flip': {'a.router': 0.8, 'b.router': 0.5}, 'fog 3': {'a.router': 0, 'b.router': 0.0}}
    changes = [{'a.router': 0.4, 'b.router': 0.4}, {'a.router': 0.2, 'b.router': 0.1}]
    convergence = {'a.router': {'distance': [1.0, 0.5, 0.0]}}
    return {'layers': layers, 'shifts': shifts, 'changes': changes, 'convergence': convergence}


def test_what_stays_is_counted_beyond_chance() -> None:
    # 1 - 0.4 / 0.8 = 0.5 and 1 - 0.4 / 0.5 = 0.2
    assert kept(measured(), 'router', measured()['changes'][0]) == pytest.approx(0.35)
    numbers = by_decider(measured())['router']
    # 1 - 0.2 / 0.8 = 0.75 and 1 - 0.1 / 0.5 = 0.8
    assert numbers['kept since the checkpoint before'] == pytest.approx(0.775)
    assert numbers['kept when mirrored'] == pytest.approx(0)  # as if chance decided anew
    assert numbers['kept when corrupted'] == 1


def test_a_run_with_one_checkpoint_and_one_expert() -> None:
    routing = {**measured(), 'changes': []}
    assert math.isnan(by_decider(routing)['router']['kept since the checkpoint before'])
    for layer in routing['layers'].values():
        layer['router/changed_by_chance'] = 0.0  # a collapsed layer: nothing can change
    assert math.isnan(kept(routing, 'router', routing['shifts']['flip']))


def test_points_and_lines_of_no_two_rows_look_alike(spec) -> None:
    rows = [f'row{number}' for number in range(25)]
    comparison = read_comparison(spec(**dict.fromkeys(rows, 'smoe')))
    usable = {(row, 1): {'routing': measured()} for row in rows}
    figures = plot_routing(comparison, Results(usable, {}, []))
    training, shifted = figures['inconsistency'].axes
    (parts,) = figures['convergence'].axes
    for axes in (training, parts):
        lines = [
            line for line in axes.lines if line.get_linestyle() != 'None'
        ]  # and no ends of bars
        drawn = {(line.get_color(), line.get_linestyle(), line.get_marker()) for line in lines}
        assert len(drawn) == len(lines) == len(rows)
    drawn = {
        (points.get_facecolor().tobytes(), points.get_paths()[0].vertices.tobytes())
        for points in shifted.collections
    }
    assert len(drawn) == len(rows)


def test_table_and_picture_have_a_line_per_row_and_decider(spec) -> None:
    comparison = read_comparison(spec(one='smoe'))
    usable = {
        ('one', 1): {'routing': measured(4.0)},
        ('one', 2): {'routing': measured(6.0)},
        ('dense', 1): {'routing': {}},
        ('dense', 2): {},
    }
    table = routing_table(comparison, Results(usable, {}, []))
    assert table[['row', 'decider', 'seeds']].values.tolist() == [['one', 'router', '2']]
    # 4 and 6: mean 5, standard deviation sqrt(2)
    assert table['after'].tolist() == ['5.00 ± 1.41']
    figures = plot_routing(comparison, Results(usable, {}, []))
    (training, _), (load, rank), (parts,) = (
        figures[claim].axes for claim in ('inconsistency', 'collapse', 'convergence')
    )
    assert training.get_legend_handles_labels()[1] == ['one, router']
    assert training.lines[0].get_ydata().tolist() == pytest.approx([0.35, 0.775])
    # a point per seed; a point per seed and layer
    assert [points.get_offsets()[0, 1] for points in load.collections] == pytest.approx([0.9, 0.9])
    ratios = [points.get_offsets()[0, 1] for points in rank.collections]
    assert ratios == pytest.approx([0.4, 0.4, 0.6, 0.6])
    assert parts.lines[0].get_ydata().tolist() == [1, 0.5, 0]
    assert [label.get_text() for label in rank.get_xticklabels()] == ['one']
    # a run that has kept fewer checkpoints is no part of the curves
    fewer = {**measured(), 'changes': measured()['changes'][:1]}
    usable['one', 3] = {'routing': fewer}
    figures = plot_routing(comparison, Results(usable, {}, []))
    assert figures['inconsistency'].axes[0].lines[0].get_ydata().tolist() == pytest.approx(
        [0.35, 0.775]
    )
    only_dense = {key: content for key, content in usable.items() if key[0] == 'dense'}
    assert routing_table(comparison, Results(only_dense, {}, [])).empty
    assert plot_routing(comparison, Results(only_dense, {}, [])) == {}
