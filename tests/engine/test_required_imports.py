"""A list of imports replaces that of its base: whoever imports VQMoE's no more is told."""

import sys
from pathlib import Path

import pytest

from vqmoe_vision.engine.cli import load_config

OWN = "custom_imports = dict(imports=['json'])\n"


def write(folder: Path, task: str, text: str = '') -> str:
    """A config on one of ours, in two steps."""
    (folder / 'base.py').write_text(f"_base_ = 'vqmoe_vision::_base_/{task}_runtime.py'\n{text}")
    (folder / 'own.py').write_text("_base_ = 'base.py'\n")
    return str(folder / 'own.py')


@pytest.mark.parametrize('task', ['classification', 'segmentation'])
def test_a_list_that_replaces_the_base_s_is_refused(
    task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = f'vqmoe_vision.{task}'
    load_config(write(tmp_path, task, OWN.replace('json', module)))
    load_config(write(tmp_path, task, OWN))  # which has been imported in another way
    monkeypatch.delitem(sys.modules, module)
    with pytest.raises(ValueError) as caught:
        load_config(write(tmp_path, task, OWN))
    assert str(caught.value) == (
        f"custom_imports.imports=['json'] is not possible: it lacks '{module}' of "
        f'configs/_base_/{task}_runtime.py, as a list replaces that of a base: '
        f"custom_imports=dict(imports=['{module}', 'json'])"
    )
    load_config(write(tmp_path, task, OWN), import_modules=False)


def test_a_config_of_others_needs_no_import(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, 'vqmoe_vision.classification', raising=False)
    (tmp_path / 'own.py').write_text(OWN)
    assert load_config(str(tmp_path / 'own.py')).custom_imports.imports == ['json']
