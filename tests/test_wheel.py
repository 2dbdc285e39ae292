"""What the wheel holds: the package, configs and tools, and neither benchmark nor tests."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from hatchling.builders.wheel import WheelBuilder

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope='module')
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, unpacked."""
    folder = tmp_path_factory.mktemp('wheel')
    (built,) = WheelBuilder(str(ROOT)).build(directory=str(folder / 'dist'), versions=['standard'])
    assert Path(built).stat().st_size < 10e6  # weights of two small models are in it
    with zipfile.ZipFile(built) as archive:
        archive.extractall(folder / 'site')
    return folder / 'site'


def names(folder: Path) -> set[str]:
    files = (path.relative_to(folder) for path in folder.rglob('*') if path.is_file())
    return {path.as_posix() for path in files if '__pycache__' not in path.parts}


def test_it_holds_the_package_configs_and_tools_and_nothing_else(wheel: Path) -> None:
    tools = names(ROOT / 'tools')
    benchmark = {name for name in tools if name.startswith('benchmark')}
    assert len(benchmark) > 1
    expected = names(ROOT / 'vqmoe_vision')
    expected |= {f'.mim/configs/{name}' for name in names(ROOT / 'configs')}
    expected |= {f'.mim/tools/{name}' for name in tools - benchmark}
    assert names(wheel / 'vqmoe_vision') == expected
    assert {'py.typed', 'models/weights/test_vit_vqmoe.safetensors'} <= expected
    (info,) = {name.partition('/')[0] for name in names(wheel)} - {'vqmoe_vision'}
    assert info.endswith('.dist-info')


def test_its_configs_are_found_in_it(wheel: Path) -> None:
    name = 'classification/cifar10.py'
    program = f'import vqmoe_vision; print(vqmoe_vision.config_path({name!r}))'
    environment = {**os.environ, 'PYTHONPATH': str(wheel)}
    command = [sys.executable, '-c', program]
    path = Path(subprocess.check_output(command, text=True, env=environment, cwd=wheel).strip())
    assert path == wheel / 'vqmoe_vision/.mim/configs' / name
    assert path.read_text() == (ROOT / 'configs' / name).read_text()
