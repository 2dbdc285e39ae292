"""Limits on fixed numbers."""

from benchmark.gates import Gate, elsewhere, judge
from benchmark.methods import LAYERS
from benchmark.networks import parse_model
from benchmark.presets import LAYER_PRESETS, NETWORK_PRESETS, Preset, ci_preset
from vqmoe_vision.moe import METHODS

CELL = dict(tokens=10, batch=2, width=8, experts=8, top_k=1, dtype='float32', amp=False, skew=1.0)
CELL |= {'mode': 'fwdbwd'}


def row(contender: str, median_ms: float, **fields) -> dict:
    return {**CELL, 'contender': contender, 'median_ms': median_ms, **fields}


def broken(gates, rows) -> list[dict]:
    return [row for row in judge(gates, rows) if row['result'] != 'met']


GATE = Gate(contender='ours', against='dense', at_most=1.2, where={'top_k': 1})


def test_a_ratio_at_its_limit_is_met_and_above_is_broken() -> None:
    assert not broken([GATE], [row('ours', 12.0), row('dense', 10.0)])  # 12 / 10 = 1.2
    (missed,) = broken([GATE], [row('ours', 12.1), row('dense', 10.0)])
    assert (missed['ratio'], missed['at_most'], missed['result']) == (1.21, 1.2, 'missed')
    assert broken([GATE], [row('ours', float('nan')), row('dense', 10.0)])


def test_rows_are_compared_within_their_configuration() -> None:
    # 10 / 10 in float32; 30 / 10 in bfloat16, where dense of float32 must not be taken
    rows = [row('ours', 10.0), row('dense', 10.0)]
    rows += [row('ours', 30.0, dtype='bfloat16'), row('dense', 10.0, dtype='bfloat16')]
    assert [missed['ratio'] for missed in broken([GATE], rows)] == [3.0]


def test_versus_compares_two_configurations_over_dense_of_each() -> None:
    gate = elsewhere(1.1, where={'experts': 64}, versus={'experts': 8, 'batch': 2})
    few = row('ours', 10.0, to_dense=1.25)  # dense takes 8 ms
    # 1.3 / 1.25 = 1.04, on a machine that is three times as slow by now
    many = row('ours', 3 * 84.0, experts=64, batch=16, to_dense=1.3)
    assert not broken([gate], [few, many])
    slow = row('ours', 84.0, experts=64, batch=16, to_dense=1.5)  # 1.5 / 1.25 = 1.2
    assert len(broken([gate], [few, slow])) == 1


def test_a_gate_without_rows_is_broken() -> None:
    assert broken([GATE], [row('dense', 10.0)]) and broken([GATE], [row('ours', 10.0)])


def test_ours_must_not_be_slower_than_a_peer() -> None:
    assert not broken([], [row('peer', 5.0, equal_to='layer', ours_to_peer=1.0)])
    (missed,) = broken([], [row('peer', 5.0, equal_to='layer', ours_to_peer=1.3)])
    assert missed['limit'].startswith('layer over peer at ')


def with_compiled(names: tuple[str, ...], preset: Preset) -> list[str]:
    return [*names, *(f'{name}+compiled' for name in names if preset.compiled)]


def test_every_method_is_in_the_tables() -> None:
    assert set(LAYERS.values()) == set(METHODS)
    measured = [set(names or ()) for _, names in LAYER_PRESETS['table'].runs]
    assert LAYERS.keys() <= set.union(*measured)
    for run in NETWORK_PRESETS['table'].comparisons:
        names = {parse_model(model)[0] for model in run.models}
        assert names == {f'vit_small_{method}' for method in METHODS}


def test_every_preset_measures_what_its_gates_judge() -> None:
    for preset in (*LAYER_PRESETS.values(), ci_preset(True), ci_preset(False)):
        rows = []
        for cell, names in preset.runs:
            names = ('dense', 'bound', *(names or ('loop', 'ours', 'layer')))
            for name in with_compiled(names, preset):
                measured = {'median_ms': 1e-9, 'to_dense': 1.0}
                rows.append({**vars(cell), 'mode': 'fwdbwd', 'contender': name, **measured})
        assert all(row['ratio'] is not None for row in judge(preset.gates, rows))
    for preset in NETWORK_PRESETS.values():
        rows = [
            dict(batch=run.batch, tokens=197, dtype=run.dtype, amp=run.amp, mode=mode)
            | {'contender': name, 'median_ms': 1.0}
            for run in preset.comparisons
            for name in with_compiled((run.baseline, *run.models), preset)
            for mode in run.modes
        ]
        assert not broken(preset.gates, rows)
