"""The scripts in tools find what they import, and the demo goes from end to end."""

import runpy
from pathlib import Path

import pytest

from vqmoe_vision.engine.cli import load_config

TOOLS = Path(__file__).parents[1] / 'tools'


@pytest.mark.parametrize('script', sorted(path.name for path in TOOLS.glob('*.py')))
def test_a_script_finds_what_it_imports(script: str) -> None:
    found = runpy.run_path(str(TOOLS / script), run_name='imported')
    assert any(callable(value) for value in found.values())


@pytest.mark.long  # most of a minute, for it draws the whole report
def test_the_demo_trains_draws_and_reports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With trainings that are cut short."""
    main = runpy.run_path(str(TOOLS / 'demo.py'), run_name='imported')['main']

    def cut_short(name: str, options: dict):
        config = load_config(name, options)
        (length,) = {'max_epochs', 'max_iters'} & config.train_cfg.keys()
        config.train_cfg.update({length: 1, 'val_interval': 1})
        config.default_hooks.checkpoint.interval = 1
        return config

    monkeypatch.setitem(main.__globals__, 'load_config', cut_short)
    monkeypatch.chdir(tmp_path)
    main()
    said = capsys.readouterr().out
    assert 'Classification: ' in said and 'Segmentation, from that checkpoint: ' in said
    places = [w.rstrip(':') for w in said.split() if w.startswith('work_dirs/demo/')]
    assert {Path(place).suffix for place in places} == {'.pth', '.log', '.png', '.html'}
    assert all(Path(place).is_file() for place in places)
