"""What the wheel holds: the package, configs and tools, and neither benchmark nor tests."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

from hatchling.builders.wheel import WheelBuilder

ROOT = Path(__file__).parents[1]


def names(folder: Path) -> set[str]:
    files = (path.relative_to(folder) for path in folder.rglob('*') if path.is_file())
    return {path.as_posix() for path in files if '__pycache__' not in path.parts}


def test_it_holds_the_package_configs_and_tools_and_nothing_else(tmp_path: Path) -> None:
    dist, wheel = str(tmp_path / 'dist'), tmp_path / 'site'
    (built,) = WheelBuilder(str(ROOT)).build(directory=dist, versions=['standard'])
    assert Path(built).stat().st_size < 4e6  # weights of two small models are in it
    with zipfile.ZipFile(built) as archive:
        archive.extractall(wheel)
    tools = names(ROOT / 'tools')
    benchmark = {name for name in tools if name.startswith('benchmark')}
    assert len(benchmark) > 1
    expected = names(ROOT / 'vqmoe_vision')
    expected |= {f'.mim/configs/{name}' for name in names(ROOT / 'configs')}
    expected |= {f'.mim/tools/{name}' for name in tools - benchmark}
    assert names(wheel / 'vqmoe_vision') == expected
    assert {'py.typed', 'models/weights/test_vit_vqmoe.safetensors'} <= expected
    (info,) = {name.partition('/')[0] for name in names(wheel)} - {'vqmoe_vision', 'vqmoe.py'}
    assert info.endswith('.dist-info')
    assert 'vqmoe = vqmoe:main' in (wheel / info / 'entry_points.txt').read_text()
    # and its configs and tools are found in it
    name = 'classification/cifar10.py'
    program = f'import vqmoe_vision; print(vqmoe_vision.config_path({name!r}))'
    environment = {**os.environ, 'PYTHONPATH': str(wheel)}
    command = [sys.executable, '-c', program]
    path = Path(subprocess.check_output(command, text=True, env=environment, cwd=wheel).strip())
    assert path == wheel / 'vqmoe_vision/.mim/configs' / name
    assert path.read_text() == (ROOT / 'configs' / name).read_text()
    command = [sys.executable, '-m', 'vqmoe', 'publish', 'none', 'out']
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=wheel)
    assert done.returncode == 1 and done.stderr.startswith("error: source='none'")
