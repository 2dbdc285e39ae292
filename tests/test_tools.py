"""`vqmoe` knows every tool and its flags, scripts find what they import, and the demo runs."""

import argparse
import json
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import vqmoe
import vqmoe_vision
from vqmoe_vision.arguments import TOOLS as NAMES
from vqmoe_vision.arguments import parser_of
from vqmoe_vision.engine.cli import load_config

ROOT = Path(__file__).parents[1]
TOOLS = ROOT / 'tools'
# commands, and with which status they end
SAID = {
    '--version': 0, '--help': 0, 'train --help': 0, 'compare run --help': 0, '': 2, 'trian': 2,
    'train': 2, f'train {__file__} --rsume': 2, f'train {__file__} --launcher torchrun': 2,
    'compare rum': 2, 'compare run x --sed 1': 2, 'train none.py': 1,
    'test vqmoe_vision::none.py none.pth': 1,
}  # fmt: skip
ALONE = """
import json, sys
import vqmoe
ended = {}
for command in json.loads(sys.argv[1]):
    sys.argv = ['vqmoe', *command.split()]
    try:
        vqmoe.main()
    except SystemExit as end:
        ended[command] = end.code if isinstance(end.code, int) else 1
print(json.dumps([ended, sorted({name.partition('.')[0] for name in sys.modules})]))
"""


def test_help_and_typos_are_told_by_the_standard_library() -> None:
    command = [sys.executable, '-c', ALONE, json.dumps([*SAID])]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    version, *_, last = done.stdout.splitlines()
    ended, modules = json.loads(last)
    assert ended == SAID and version == vqmoe_vision.__version__
    assert not {'torch', 'timm', 'numpy', 'mmengine', 'vqmoe_vision'} & {*modules}


@pytest.mark.parametrize('tool', NAMES)
def test_examples_in_the_help_of_a_tool_are_possible(tool: str) -> None:
    assert (TOOLS / f'{tool}.py').is_file()
    *sentences, examples = NAMES[tool]
    assert examples and all(text[0].isupper() and '.' in text for text in sentences)
    for example in examples:
        parser_of(tool).parse_args(shlex.split(example))


@pytest.mark.parametrize('tool', NAMES)
def test_vqmoe_and_a_tool_take_the_same_arguments(
    tool: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[list[str]] = []
    run_path = runpy.run_path

    def run(path: str, **options: str) -> dict:
        if Path(path).parent != TOOLS:
            return run_path(path, **options)
        ran.append(sys.argv)
        return {}

    monkeypatch.setattr(runpy, 'run_path', run)
    for example in NAMES[tool][2]:
        words = [word if word != 'CONFIG' else __file__ for word in shlex.split(example)]
        monkeypatch.setattr(sys, 'argv', ['vqmoe', tool, *words])
        vqmoe.main()
        assert ran.pop() == [str(TOOLS / f'{tool}.py'), *words]


@pytest.mark.parametrize('script', sorted(path.name for path in TOOLS.glob('*.py')))
def test_a_script_finds_what_it_imports(script: str) -> None:
    found = runpy.run_path(str(TOOLS / script), run_name='imported')
    assert any(callable(value) for value in found.values())


@pytest.mark.long  # most of a minute, for it draws the whole report
def test_the_demo_trains_draws_and_reports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With trainings that are cut short."""
    show = runpy.run_path(str(TOOLS / 'demo.py'), run_name='imported')['show']

    def cut_short(name: str, options: dict):
        config = load_config(name, options)
        (length,) = {'max_epochs', 'max_iters'} & config.train_cfg.keys()
        config.train_cfg.update({length: 1, 'val_interval': 1})
        config.default_hooks.checkpoint.interval = 1
        return config

    monkeypatch.setitem(show.__globals__, 'load_config', cut_short)
    monkeypatch.chdir(tmp_path)
    show(argparse.Namespace(quick=True))
    said = capsys.readouterr().out
    assert len(said.splitlines()) <= 60
    places = [word for word in said.split() if word.startswith('work_dirs/demo/')]
    assert {Path(place).suffix for place in places} >= {'.pth', '.png', '.html'}
    assert all(Path(place).exists() for place in places)
