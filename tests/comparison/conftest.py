"""A repository whose programs take no time, so that a queue of runs can be tested."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vqmoe_vision.comparison import cli, store
from vqmoe_vision.comparison.cli import compare
from vqmoe_vision.comparison.spec import read_comparison
from vqmoe_vision.comparison.store import Run, Store

# What the queue needs of a training: files, an exit status, time. Rows choose by their options.
TRAIN = """
import json, os, sys, time
from pathlib import Path
options = dict(word.split('=', 1) for word in sys.argv if '=' in word)
folder = Path(sys.argv[sys.argv.index('--work-dir') + 1])
folder.mkdir(parents=True, exist_ok=True)
with open('calls', 'a') as calls:
    print(*sys.argv[1:], file=calls)
kind = options.get('train_cfg.kind')
named = {k: v for k, v in options.items() if k in ('model.checkpoint', 'load_from')}
start = next(iter(named.values()), None)
if start is not None and not Path(start).is_file():
    sys.exit('error: ' + start + ' is not there')
if kind == 'fails':
    print('a long trace')
    sys.exit('error: there is no memory left')
if kind == 'killed':
    os.kill(os.getpid(), 9)
if kind == 'waits' and '--resume' not in sys.argv:
    (folder / 'iter_1.pth').touch()
    (folder / 'progress').write_text('1 2')
    Path('pid').write_text(str(os.getpid()))
    while not Path('go').exists():
        time.sleep(0.02)
if kind == 'meets':
    Path('met_' + options['randomness.seed']).touch()
    while not (Path('met_1').exists() and Path('met_2').exists()):
        time.sleep(0.02)
(folder / 'iter_2.pth').touch()
(folder / 'last_checkpoint').write_text('iter_2.pth')
seed, drift = int(options['randomness.seed']), float(os.environ.get('DRIFT', 0))
losses = [(1 + drift) / (i + seed) for i in range(20)]
Path(folder / 'run.json').write_text(json.dumps(dict(
    seed=seed, commit='abc', versions={}, device='cpu', hardware='stub', threads=1, minutes=2.0,
    cpu_minutes=1.0, iterations=2, params=2, active_params=1, macs=10**6, first_losses=losses,
    moe_options={}, starting_weights={name: 'weights' for name in named},
    training_loss=[[1, 2.0], [2, 1.0]],
    held_out=[[1, {'mIoU': 1.0}], [2, {'mIoU': 2.0, 'blocks.1.mlp/load_unused': 1.0}]],
)))
"""
TEST = """
import json, sys
from pathlib import Path
checkpoint, out = sys.argv[2], Path(sys.argv[sys.argv.index('--out') + 1])
assert Path(checkpoint).name == 'iter_2.pth'
out.write_text(json.dumps({'mIoU': 3.0, 'blocks.1.mlp/load_unused': 0.0}))
"""
CONFIG = """
custom_imports = dict(imports=['vqmoe_vision.classification'])
model = dict(
    type='Classifier', model_name='vit_tiny_smoe', moe=dict(preset='paper'), num_classes=2,
    img_size=32, embed_dim=8, depth=2, num_heads=1,
)
train_cfg = dict(max_iters=2)
"""
ROWS = Path('docs/results/rows/spec')
SPEC = "config = 'config.py'\nmetric = 'mIoU'\nseeds = [1, 2]\nrows = dict({rows})\n"


@pytest.fixture
def repository(tmp_path, monkeypatch) -> Path:
    (tmp_path / 'tools').mkdir()
    (tmp_path / 'tools/train.py').write_text(TRAIN)
    (tmp_path / 'tools/test.py').write_text(TEST)
    (tmp_path / 'config.py').write_text(CONFIG)
    monkeypatch.setattr(store, 'FOLDER', tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def spec(repository) -> Callable[..., str]:
    """Writes a comparison with rows besides dense; gives its path."""

    def write(more: str = '', **rows: str) -> str:
        listed = ', '.join(f'{k}={v!r}' for k, v in {'dense': 'dense_1x', **rows}.items())
        Path('spec.py').write_text(SPEC.format(rows=listed) + more)
        return 'spec.py'

    return write


@pytest.fixture
def fill(spec) -> Callable[..., str]:
    """Writes results as finished runs leave them: scores by row, one for each seed from 1 on."""

    def write(scores: dict[str, list[float]], more: str = '', **changes: Any) -> str:
        seeds = list(range(1, 1 + max(map(len, scores.values()))))
        rows = {row: f'train_cfg.row={row}' for row in scores}
        rows |= {row: f'{rows[row]} model.checkpoint=a.pth' for row in rows if '_started' in row}
        path = spec(f'seeds = {seeds}\n{more}', **rows)
        comparison = read_comparison(path)
        store = Store(ROWS)
        for row, values in scores.items():
            for seed, value in enumerate(values, 1):
                run = Run(comparison, row, seed, Path('work_dirs/comparisons'))
                run.folder.mkdir(parents=True)
                record = dict(seed=seed, commit='abc', device='cpu', hardware='stub', iterations=2)
                record |= dict(minutes=9.0, cpu_minutes=1.5, params=2 * 10**6, active_params=10**6)
                record |= dict(macs=10**7, first_losses=[1.0 / i for i in range(1, 21)])
                record |= dict(training_loss=[[1, 2.0], [2, 1.0]], **changes.get(row, {}))
                held_out = [[1, {'mIoU': value / 2}], [2, {'mIoU': value}]]
                record = {'held_out': held_out, **record}
                test = {'mIoU': value, 'weights': '0123456789abcdef'}
                for layer, unused in (('blocks.1.mlp', 0.0), ('blocks.3.mlp', 1.0)):
                    test[f'{layer}/load_unused'] = unused
                    test[f'{layer}/code_usage_perplexity'] = 4.25
                (run.folder / 'run.json').write_text(json.dumps(record))
                (run.folder / 'test.json').write_text(json.dumps(test))
                store.collect(run)
        return path

    return write


def table() -> str:
    return Path('docs/results/tables/spec.md').read_text()


def change(name: str, **fields: Any) -> None:
    """A row has other fields, or none that are None."""
    path = ROWS / f'{name}.json'
    content = {**json.loads(path.read_text()), **fields}
    path.write_text(json.dumps({n: v for n, v in content.items() if v is not None}))


@pytest.fixture
def says(capsys) -> Callable[..., str]:
    """What the program says; of one that fails the line of its error."""

    def run(*arguments: str) -> str:
        capsys.readouterr()
        try:
            compare(arguments)
        except SystemExit as end:
            return str(end)
        return capsys.readouterr().out

    return run


@pytest.fixture
def tables_alone(request, monkeypatch) -> None:
    """Figures take seconds, so only the tests that are about them draw them."""
    if not any(word in request.node.name for word in ('figure', 'images')):
        monkeypatch.setattr(cli, 'draw_figures', lambda *made: [])
