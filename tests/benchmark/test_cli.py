"""The command: a tiny run end to end, JSON to plot, and mistakes in one line."""

import json
from pathlib import Path

import pytest

from benchmark.cli import main
from benchmark.layers import FLOORS, OURS
from benchmark.plots import draw_savings

TINY = [
    *('--tokens', '8', '--batch', '2', '--width', '8', '--experts', '4'),
    *('--repeats', '1', '--threads', '1'),
]


def test_layers_end_to_end(tmp_path: Path, capsys) -> None:
    out = tmp_path / 'new' / 'run.json'
    main(['moe', *TINY, '--top-k', '1', '2', '--contenders', *OURS, '--out', str(out)])
    run = json.loads(out.read_text())
    assert run['header']['isa'] and run['header']['versions']['torch']
    absent = [cell['reasons'] for cell in run['skipped']]
    assert absent[1] == {}  # every method can compute two experts per token
    assert [(row['top_k'], row['contender']) for row in run['rows']] == [
        (k, name) for k in (1, 2) for name in (*FLOORS, *OURS) if name not in absent[k - 1]
    ]
    for row in run['rows']:
        assert row['min_ms'] <= row['median_ms'] and row['peak_mb'] > 0
        assert row['tokens_per_expert'] == 4 * row['top_k']  # 16 tokens over 4 experts
    printed = capsys.readouterr().out
    assert '2 x 8 tokens, width 8, 4 experts, top-2, float32, skew 1' in printed

    pytest.importorskip('matplotlib')
    plot = tmp_path / 'run.png'
    main(['moe', '--from', str(out), '--plot', str(plot)])
    assert plot.read_bytes().startswith(b'\x89PNG')


def test_skewed_cells_leave_out_what_routes_by_itself(tmp_path: Path) -> None:
    out = tmp_path / 'run.json'
    main(['moe', *TINY, '--skew', '3', '--contenders', 'ours', 'layer', '--out', str(out)])
    run = json.loads(out.read_text())
    assert [row['contender'] for row in run['rows']] == ['dense', 'bound', 'ours']
    assert run['rows'][-1]['load'] == 3.0  # 12 of 16 tokens, the mean is 4
    assert 'routes by itself' in run['skipped'][0]['reasons']['layer']


def test_sweeps_are_drawn_as_curves(tmp_path: Path) -> None:
    pytest.importorskip('matplotlib')
    fields = {'dtype': 'float32', 'mode': 'fwdbwd', 'sweep': 'experts', 'to_dense': 1.0}
    rows = [
        {**fields, 'contender': name, 'experts': e, 'median_ms': 1.0 * e, 'peak_mb': 2.0 * e}
        for name in ('dense', 'ours')
        for e in (4, 8)
    ]
    saved, plot = tmp_path / 'run.json', tmp_path / 'run.png'
    saved.write_text(json.dumps({'command': 'moe', 'header': {}, 'rows': rows}))
    main(['moe', '--from', str(saved), '--plot', str(plot)])
    assert plot.read_bytes().startswith(b'\x89PNG')


def test_what_the_discrete_form_saves_is_drawn() -> None:
    figure = pytest.importorskip('matplotlib.figure').Figure()
    full = 'vit_tiny_vqmoe,moe_layers=last2'
    common = {'batch': 1, 'mode': 'inference', 'baseline': full}
    rows = [
        {**common, 'contender': full, 'macs': 100, 'to_baseline': 1.0},
        {**common, 'contender': f'{full},form=discrete', 'macs': 72, 'to_baseline': 0.8},
        {**common, 'contender': 'vit_tiny_patch16_224', 'macs': 71, 'to_baseline': 0.7},
    ]
    draw_savings(figure, rows)
    (axes,) = figure.axes
    # 1 - 72 / 100 of the work and 1 - 0.8 of the time; a dense model is no form
    assert [bar.get_height() for bar in axes.patches] == pytest.approx([28, 20])
    assert [label.get_text() for label in axes.get_xticklabels()] == ['last2']


def test_models_end_to_end(tmp_path: Path) -> None:
    out = tmp_path / 'run.json'
    tiny = 'depth=2,embed_dim=24,num_heads=2'
    models = ['--models', f'vit_tiny_smoe,top_k=1,{tiny}', '--baseline']
    options = '--img-size 32 --batch 2 --repeats 1 --threads 1 --dtype float32 bfloat16 --amp'
    command = ['model', *models, f'vit_tiny_patch16_224,{tiny}', *options.split()]
    main([*command, '--out', str(out)])
    rows = json.loads(out.read_text())['rows']
    assert [(row['amp'], row['mode']) for row in rows[::2]] == [
        (amp, mode) for amp in (False, True) for mode in ('inference', 'training')
    ]
    dense, smoe = rows[2:4]
    assert dense['to_baseline'] == 1.0
    assert list(smoe['parts_ms']) == ['forward', 'backward', 'optimizer']
    # one block of 8 experts, 7 of them idle: 7 * (2 * 24 * 96 + 96 + 24) parameters
    assert smoe['params'] - smoe['active_params'] == 7 * (2 * 24 * 96 + 96 + 24)
    assert smoe['images_per_s'] == pytest.approx(2000 / smoe['median_ms'])


def test_a_model_of_evas_blocks_is_measured(tmp_path: Path) -> None:
    tiny = 'depth=1,embed_dim=24,num_heads=2,patch_size=16'
    command = f'model --models eva02_tiny_patch14_224,{tiny} --img-size 32 --modes inference '
    command += f'--baseline vit_tiny_patch16_224,{tiny} --batch 1 --repeats 1 --threads 1 '
    main([*command.split(), '--out', str(tmp_path / 'run.json')])
    rows = json.loads((tmp_path / 'run.json').read_text())['rows']
    # 2 x 2 patches and a class token
    assert [row['tokens'] for row in rows] == [5, 5] and rows[1]['macs'] > 0


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ('moe --contenders nobody', "contenders='nobody' is not possible: one of"),
        ('moe --skew 9', 'skew=9.0 is not possible: from 1 to experts / top_k = 8'),
        ('moe --preset ci --tokens 3', "--preset='ci' is not possible: only without --tokens"),
        ('moe --gate', '--gate=True is not possible: only with --preset'),
        ('moe --preset scaling --gate', '--gate=True is not possible: only with a preset that has'),
        ('model --preset discrete --gate', '--gate=True is not possible: only with a preset that'),
        ('moe --device cuda --clock process', "clock='process' is not possible: 'wall' on a GPU"),
        ('moe --from no.json', 'no.json does not exist'),
        ('moe --preset table --gate --mode fwd', "--mode='fwd' is not possible: fwdbwd where"),
        ('moe --preset ci --mode fwd', "--mode='fwd' is not possible: fwdbwd where"),
        (
            'moe --preset table --capacity-factor 2',
            '--capacity-factor=2.0 is not possible: only with',
        ),
        ('moe --capacity-factor 2 --contenders ours', '--capacity-factor=2.0 is not possible'),
        ('training no.py --threads 1', "config 'no.py' does not exist"),
        (
            'training no.py --cfg-options x --threads 1',
            "--cfg-options='x' is not possible: name=value",
        ),
        ('training no.py --iterations 0', '--iterations=0 is not possible: at least 1'),
        ('tune --constants nobody', "--constants='nobody' is not possible: one of _BLOCK, "),
        ('tune --repeats 0', 'repeats=0 is not possible: at least 1'),
        ('data no.py', "config 'no.py' does not exist"),
        ('data no.py --images 0', '--images=0 is not possible: at least 1'),
        ('moe --from no.json --plot a.png', 'no.json does not exist'),
        ('moe --repeats 0', 'repeats=0 is not possible: at least 1'),
        ('model --threads 1 --models nobody', "models='nobody' is not possible: a timm model"),
        (
            'model --threads 1 --models vit_tiny_smoe,x',
            "models='vit_tiny_smoe,x' is not possible: options are",
        ),
        ('model --threads 1 --models vit_tiny_smoe,x=1', "'x' is neither an argument"),
        (
            'model --threads 1 --models swin_tiny_patch4_window7_224,embed_dim=24',
            'model=SwinTransformer is not possible: a timm VisionTransformer or Eva',
        ),
    ],
)
def test_mistakes_are_one_line(arguments: str, message: str) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(arguments.split())
    line = str(exit_.value.code)
    assert line.startswith('error: ') and message in line and '\n' not in line


SAVED = {
    **{
        'tokens': 197,
        'batch': 8,
        'width': 384,
        'experts': 8,
        'top_k': 1,
        'skew': 1.0,
        'amp': False,
    },
    **{'dtype': 'float32', 'mode': 'fwdbwd', 'sweep': ''},
}


@pytest.mark.parametrize('gated', [True, False])
def test_a_saved_run_is_judged(tmp_path: Path, capsys, gated: bool) -> None:
    """Rows of one configuration only: every other limit of the preset is not measured."""
    saved, plot = tmp_path / 'run.json', tmp_path / 'run.png'
    rows = [
        {**SAVED, 'contender': name, 'median_ms': 1.0, 'to_dense': 1.0}
        for name in ('dense', 'ours')
    ]
    saved.write_text(json.dumps({'command': 'moe', 'header': {}, 'rows': rows}))
    arguments = ['moe', '--preset', 'table', '--from', str(saved)]
    if not gated:
        main([*arguments, '--plot', str(plot)])
        assert capsys.readouterr().out == f'wrote {plot}\n'
        return
    with pytest.raises(SystemExit) as exit_:
        main([*arguments, '--gate'])
    assert exit_.value.code == 1
    printed = capsys.readouterr().out
    assert 'met: ours dtype=float32 tokens=197 top_k=1' in printed and 'not measured' in printed


@pytest.mark.parametrize(
    ('arguments', 'change', 'message'),
    [
        ('moe', {}, 'only with --plot or --gate'),
        ('moe --plot a.png --repeats 3', {}, r"without what sets up a run: \['repeats'\]"),
        ('moe --plot a.png --tokens 8', {}, r"without what sets up a run: \['tokens'\]"),
        ('model --preset table --gate', {}, "a run of 'model'"),
        ('moe --preset table --gate', {'mode': 'fwd'}, 'a run with backward passes'),
    ],
)
def test_mistakes_about_a_saved_run(tmp_path: Path, arguments: str, change: dict, message) -> None:
    saved = tmp_path / 'run.json'
    rows = [{**SAVED, **change, 'contender': 'ours', 'median_ms': 1.0}]
    saved.write_text(json.dumps({'command': 'moe', 'header': {}, 'rows': rows}))
    with pytest.raises(SystemExit, match=message):
        main([*arguments.split(), '--from', str(saved)])


@pytest.mark.parametrize('way', [['--plot', 'a.png'], ['--preset', 'table', '--gate']])
@pytest.mark.parametrize(
    ('content', 'message'),
    [
        (b'\x00\x84\xff', 'a file that --out of this program wrote'),
        (b'{"command": "moe", "header": {}, "rows": []}', 'a run in which something was measured'),
        (b'{"command": "export", "header": {}, "rows": [{}]}', "a run of 'moe'"),
    ],
)
def test_what_is_no_saved_run(tmp_path: Path, content: bytes, message: str, way: list[str]) -> None:
    saved = tmp_path / 'run.json'
    saved.write_bytes(content)
    with pytest.raises(SystemExit) as exit_:
        main(['moe', '--from', str(saved), *way])
    assert exit_.value.code == f'error: --from={str(saved)!r} is not possible: {message}'


def test_exports_end_to_end(tmp_path: Path, capsys) -> None:
    tiny = 'img_size=32,patch_size=16,depth=2,embed_dim=12,num_heads=3'
    models = [f'vit_tiny_patch16_224,{tiny}', f'vit_tiny_vqmoe,{tiny},num_experts=2,form=discrete']
    out = tmp_path / 'run.json'
    ways = ['--ways', 'program', '--batch', '1', '3', '--repeats', '1', '--out', str(out)]
    main(['export', '--baseline', models[0], '--models', models[1], *ways, '--debug'])
    assert 'to_baseline_3' in capsys.readouterr().out
    rows = json.loads(out.read_text())['rows']
    assert [(r['contender'], r['way']) for r in rows] == [
        (model, way) for model in models for way in ('eager', 'program')
    ]
    for row in rows:
        assert row['difference'] < 1e-5 and row['ms_1'] > 0 and row['to_baseline_3'] > 0
        assert (row['file_bytes'] is None) == (row['way'] == 'eager')


def test_a_training_step_is_split(tmp_path: Path, capsys) -> None:
    out = tmp_path / 'run.json'
    config = Path(__file__).parents[2] / 'configs/classification/digits/demo/vit_tiny_vqmoe_demo.py'
    size = 'model.depth=2 model.embed_dim=12 train_dataloader.batch_size=4'
    workers = 'train_dataloader.num_workers=0 train_dataloader.persistent_workers=False'
    options = ['--cfg-options', *size.split(), *workers.split()]
    main(
        [
            'training',
            str(config),
            '--iterations',
            '3',
            '--threads',
            '1',
            *options,
            '--out',
            str(out),
        ]
    )
    (row,) = json.loads(out.read_text())['rows']
    assert row['images'] == 4
    assert list(row['parts_ms']) == ['data', 'forward', 'backward', 'optimizer', 'hooks']
    assert all(ms > 0 for ms in row['parts_ms'].values())
    assert '4 images per step' in capsys.readouterr().out


def test_what_the_runner_adds_to_a_bare_step(tmp_path: Path, capsys) -> None:
    out = tmp_path / 'run.json'
    config = Path(__file__).parents[2] / 'configs/classification/digits/demo/vit_tiny_vqmoe_demo.py'
    size = 'model.depth=2 model.embed_dim=12 train_dataloader.batch_size=4'
    measured = ['--overhead', '--iterations', '3', '--threads', '1', '--out', str(out)]
    main(['training', str(config), *measured, '--cfg-options', *size.split()])
    (row,) = json.loads(out.read_text())['rows']
    assert row['bare_ms'] > 0 and len(row['added_ms']) == 3
    assert 'of processor time to a bare step of' in capsys.readouterr().out


def test_a_bare_step_of_several_iterations_is_one_line() -> None:
    config = Path(__file__).parents[2] / 'configs/classification/digits/demo/vit_tiny_vqmoe_demo.py'
    size = 'model.depth=2 model.embed_dim=12 train_dataloader.batch_size=4'
    options = [*size.split(), 'optim_wrapper.accumulative_counts=2']
    message = r'^error: optim_wrapper\.accumulative_counts=2 is not possible: 1 with --overhead'
    with pytest.raises(SystemExit, match=message):
        main(['training', str(config), '--overhead', '--threads', '1', '--cfg-options', *options])


def test_debug_shows_the_trace() -> None:
    with pytest.raises(ValueError, match='nobody'):
        main(['moe', '--contenders', 'nobody', '--debug'])


def test_an_absent_peer_is_an_error_only_when_named(monkeypatch) -> None:
    monkeypatch.setattr('benchmark.layers.installed', lambda name: None)
    with pytest.raises(SystemExit) as exit_:
        main(['moe', '--contenders', 'soft-moe'])
    assert "it is not installed: pip install '.[bench]'" in str(exit_.value.code)
    main(['moe', *TINY])
