import json
from pathlib import Path

import pytest

from vqmoe_vision.analysis.curves import curves, newest_scalars, plot_curves, read_scalars

# Two epochs of five iterations, logged every two: what mmengine's LocalVisBackend writes.
RECORDS = [
    {'loss': 2.0, 'blocks.1.mlp/vq_loss': 0.5, 'epoch': 1, 'iter': 2, 'step': 2},
    {'loss': 1.5, 'blocks.1.mlp/vq_loss': 0.4, 'epoch': 1, 'iter': 4, 'step': 4},
    {'val/blocks.1.mlp/load_unused': 3, 'step': 5},
    {'accuracy/top1': 60.0, 'time': 0.1, 'step': 1},
    {'loss': 1.0, 'blocks.1.mlp/vq_loss': 0.3, 'epoch': 2, 'iter': 7, 'step': 7},
    {'loss': 0.5, 'blocks.1.mlp/vq_loss': 0.2, 'epoch': 2, 'iter': 9, 'step': 9},
    {'val/blocks.1.mlp/load_unused': 0, 'step': 10},
    {'accuracy/top1': 80.0, 'time': 0.1, 'step': 2},
]


def test_validation_is_placed_at_the_iteration_before_it() -> None:
    collected = curves(RECORDS)
    assert collected['loss'] == ([2, 4, 7, 9], [2.0, 1.5, 1.0, 0.5])
    assert collected['accuracy/top1'] == ([4, 9], [60.0, 80.0])


def test_newest_run_is_read(tmp_path: Path) -> None:
    for start, accuracy in (('20250102_000000', 2.0), ('20250101_235959', 1.0)):
        folder = tmp_path / start / 'vis_data'
        folder.mkdir(parents=True)
        lines = [json.dumps({'accuracy/top1': accuracy, 'step': 1}), json.dumps(RECORDS[0])]
        (folder / 'scalars.json').write_text('\n'.join(lines) + '\n')
    records = read_scalars(newest_scalars(tmp_path))
    assert records == [{'accuracy/top1': 2.0, 'step': 1}, RECORDS[0]]


def test_missing_run_names_the_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f'work_dir: .*{tmp_path.name}'):
        newest_scalars(tmp_path)


def test_one_panel_per_kind_of_scalar() -> None:
    figure = plot_curves(RECORDS, 'a run')
    drawn = {axes.get_title(): axes.lines for axes in figure.axes}
    assert set(drawn) == {
        'Training loss',
        'Held-out accuracy (%)',
        'Auxiliary losses, weighted',
        'Unused experts, held-out images',
    }
    (line,) = drawn['Held-out accuracy (%)']
    assert list(line.get_xdata()) == [4, 9]
    assert list(line.get_ydata()) == [60.0, 80.0]


def test_records_without_a_known_scalar_are_refused() -> None:
    with pytest.raises(ValueError, match=r"records: none of the scalars \['lr'"):
        plot_curves([{'lr': 0.1, 'step': 1}], 'a run')
