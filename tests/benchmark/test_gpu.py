"""What `make gpu-check` makes of its parts: one row, saved after each, and limits."""

import json

import pytest

from benchmark import gpu
from benchmark.cli import main
from benchmark.oracle import WrongResultError

# issue's figures for an H100: width to an MoE over dense, in the layer and in a whole ViT
OVER_DENSE = {384: 1.20, 768: 1.11, 1024: 1.09}
VITS = {'small': 384, 'base': 768, 'large': 1024}
FAST, WRONG = 10.0, {'kernel': 'batched', 'result': 'off', 'ok': False}
WIDTHS = sorted(OVER_DENSE)


@pytest.fixture
def measured(monkeypatch):
    """Nothing is measured: milliseconds of a contender are looked up, else `FAST`."""
    milliseconds = {}

    def rows(names, **fields):
        return [
            {'contender': name, 'median_ms': milliseconds.get((fields['width'], name), FAST)}
            | fields
            for plain in names
            for name in (plain, f'{plain}+compiled')
        ]

    def layers(runs, settings):
        ((cell, names),) = runs
        assert settings.compiled and cell.num_tokens >= 25_000
        return rows(('dense', *names), **vars(cell), mode='fwdbwd'), []

    def networks(comparisons, settings):
        (run,) = comparisons
        assert settings.compiled and run.batch * 197 >= 25_000
        width = VITS[run.baseline.split('_')[1]]
        fields = dict(width=width, batch=run.batch, tokens=197, dtype=run.dtype, mode='training')
        return rows((run.baseline, *run.models), **fields)

    for name in ('check_kernels', 'check_methods', 'check_configs'):
        monkeypatch.setattr(gpu, name, lambda settings: [])
    monkeypatch.setattr(gpu, 'run_layers', layers)
    monkeypatch.setattr(gpu, 'run_networks', networks)
    return milliseconds


def check(folder, *options):
    """The row of a run, and the status that the command ends with."""
    status, out = 0, folder / 'row.json'
    try:
        main(['gpu', '--device', 'cpu', '--out', str(out), *options])
    except SystemExit as stopped:
        status = stopped.code
    return json.loads(out.read_text()), status


def missed(run):
    return [row['limit'] for row in run['limits'] if row['result'] == 'missed']


def vit(width):
    """Top-1 SMoE in a ViT of a width, and the dense one."""
    size = next(size for size, known in VITS.items() if known == width)
    return f'vit_{size}_smoe,top_k=1', f'vit_{size}_patch16_224'


@pytest.mark.parametrize('form', ['', '+compiled'])
@pytest.mark.parametrize(
    ('width', 'what'), [*zip(WIDTHS, ('ours', 'layer', 'network'), strict=True)]
)
def test_an_moe_is_held_to_its_share_over_dense(measured, tmp_path, capsys, width, what, form):
    smoe, dense = vit(width) if what == 'network' else (what, 'dense')
    # both forms, lest the compiled one be slower than the eager one
    at_most = OVER_DENSE[width]
    measured[width, smoe] = measured[width, f'{smoe}+compiled'] = FAST * (at_most - 0.001)
    run, status = check(tmp_path)
    assert missed(run) == [] and status == 0
    measured[width, smoe + form] = FAST * (at_most + 0.001)
    run, status = check(tmp_path)
    (name,) = missed(run)
    assert name.startswith(f'{smoe}{form}') and f' over {dense}{form} at 128 x 197' in name
    assert status == 0  # a report, unless asked for
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith('missed'))
    assert line.split()[1:3] == [f'{at_most + 0.001:.2f}', f'{at_most:g}'] and name in line
    assert check(tmp_path, '--gate')[1] == 1


def test_a_run_is_saved_after_each_part(measured, monkeypatch, tmp_path):
    file, saved = tmp_path / 'row.json', []

    def methods(settings):
        saved.append(json.loads(file.read_text()))
        return []

    def layers(preset, settings):
        raise WrongResultError('ours is off; not timed')

    def networks(preset, settings):
        saved.append(json.loads(file.read_text()))
        return timed(preset, settings)

    timed = gpu.run_networks
    monkeypatch.setattr(gpu, 'check_kernels', lambda settings: [WRONG])
    monkeypatch.setattr(gpu, 'check_methods', methods)
    monkeypatch.setattr(gpu, 'run_layers', layers)
    monkeypatch.setattr(gpu, 'run_networks', networks)
    run, status = check(tmp_path)
    assert status == 1
    assert saved[0]['kernels'] == saved[0]['failed'] == [WRONG] and 'methods' not in saved[0]
    # each width of the layers fails, and the networks of each are timed and saved all the same
    parts = [row.get('step') for row in saved[1]['failed']]
    assert parts == [None, *(f'layers of width {width}' for width in WIDTHS)]
    assert 'WrongResultError: ours is off' in saved[1]['failed'][1]['result']
    saves = (*saved[2:], run)
    sizes = [{row['width'] for row in after['networks']} for after in saves]
    assert sizes == [{384}, {384, 768}, {384, 768, 1024}]
    judged = [sum(row['result'] == 'met' for row in after['limits']) for after in saves]
    assert judged == sorted(set(judged)) and judged[0] > 0
    assert list(run['seconds'])[:3] == ['kernels', 'methods', 'configs']
