"""The package as a whole: which part may import which, and what the base install needs."""

import argparse
import ast
import importlib
import inspect
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from importlib.util import find_spec, resolve_name
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from hatchling.builders.wheel import WheelBuilder
from mmengine import registry
from PIL import Image

import vqmoe
import vqmoe_vision
from vqmoe_vision import provenance
from vqmoe_vision.arguments import TOOLS as NAMES
from vqmoe_vision.arguments import parser_of
from vqmoe_vision.engine.cli import load_config
from vqmoe_vision.moe import METHODS, MoeConfig, MoeLayer
from vqmoe_vision.provenance import commit, processor

from .forked import run_tool

ROOT = Path(__file__).parents[1]
PACKAGE, TOOLS = ROOT / 'vqmoe_vision', ROOT / 'tools'
# A part may import itself and the parts of a lower layer.
LAYERS = {
    'arguments': 0,
    'provenance': 0,
    'moe': 0,
    'models': 1,
    'engine': 2,
    'script': 2,
    'analysis': 3,
    'classification': 4,
    'segmentation': 4,
    'comparison': 4,
    'contrib': 5,  # the core does without: `METHODS` has an import path for its method
    '__main__': 5,
}


def imported_parts(source: str, package: str) -> set[str]:
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = resolve_name('.' * node.level + (node.module or ''), package)
            names += [f'{base}.{alias.name}' for alias in node.names]
    return {n.split('.')[1] for n in names if n.startswith('vqmoe_vision.')} & LAYERS.keys()


def test_imports_point_down():
    for path in {*PACKAGE.rglob('*.py')} - {PACKAGE / '__init__.py'}:
        relative = path.relative_to(ROOT)
        part = relative.parts[1].removesuffix('.py')
        others = imported_parts(path.read_text(), '.'.join(relative.parent.parts)) - {part}
        assert all(LAYERS[other] < LAYERS[part] for other in others), (relative, others)


def test_version_changelog_and_citation_agree():
    version = vqmoe_vision.__version__
    newest = re.search('^## (.*)$', (ROOT / 'CHANGELOG.md').read_text(), re.MULTILINE)
    released = f'{re.escape(version)} - [0-9]{{4}}-[0-9]{{2}}-[0-9]{{2}}'
    assert newest
    assert re.fullmatch('Unreleased' if version.endswith('.dev0') else released, newest[1])
    assert f'\nversion: {version}\n' in (ROOT / 'CITATION.cff').read_text()


def test_readme_citation_and_code_call_the_paper_alike():
    title = 'On the Role of Discrete Representation in Sparse Mixture of Experts'
    for file in ('README.md', 'CITATION.cff', 'vqmoe_vision/moe/methods/vqmoe.py'):
        assert title in (ROOT / file).read_text()


def names(folder: Path) -> set[str]:
    files = (path.relative_to(folder) for path in folder.rglob('*') if path.is_file())
    return {path.as_posix() for path in files if '__pycache__' not in path.parts}


# in the place of the wheel, as `vqmoe` begins, without mmengine and with it
PROGRAM = """import gc, sys
given = sys.argv
gc.disable()
import torch, timm
def imported():
    print(*{name.partition('.')[0] for name in sys.modules}, 'vqmoe_vision.contrib' in sys.modules)
imported()
import vqmoe, vqmoe_vision
from vqmoe_vision.moe import METHODS
names = [*METHODS], 'mocle' in METHODS
imported()
METHODS['mocle']
imported()
print(vqmoe_vision.config_path('classification/cifar10.py'))
sys.modules['mmengine'] = None
for _ in range(2):
    sys.argv = [*given]
    try:
        vqmoe.main()
    except SystemExit as end:
        print(end.code, file=sys.stderr)
    sys.modules.pop('mmengine', None)
"""


def test_a_wheel_holds_all_that_it_needs_and_nothing_else(tmp_path):
    dist, wheel = str(tmp_path / 'dist'), tmp_path / 'site'
    (built,) = WheelBuilder(str(ROOT)).build(directory=dist, versions=['standard'])
    assert Path(built).stat().st_size < 4e6  # weights of two small models are in it
    with zipfile.ZipFile(built) as archive:
        archive.extractall(wheel)
    tools = {name for name in names(ROOT / 'tools') if not name.startswith('benchmark')}
    expected = names(ROOT / 'vqmoe_vision') | {f'.mim/tools/{name}' for name in tools}
    expected |= {f'.mim/configs/{name}' for name in names(ROOT / 'configs')}
    assert names(wheel / 'vqmoe_vision') == expected
    assert {'py.typed', 'models/weights/test_vit_vqmoe.safetensors'} <= expected
    (info,) = {name.partition('/')[0] for name in names(wheel)} - {'vqmoe_vision', 'vqmoe.py'}
    assert info.endswith('.dist-info')
    assert 'vqmoe = vqmoe:main' in (wheel / info / 'entry_points.txt').read_text()
    scenes = 'vqmoe_vision::segmentation/segmenter_vit-4x96-vqmoe_mask_1xb64-1k_digits-48x48.py'
    command = ['predict', scenes, 'none.pth', str(tmp_path / 'dist')]
    command, environment = [sys.executable, '-c', PROGRAM, *command], {'PYTHONPATH': str(wheel)}
    given: Any = dict(capture_output=True, text=True, cwd=wheel, env=os.environ | environment)
    done = subprocess.run(command, **given)
    *listed, path = done.stdout.splitlines()
    before, after, last = (set(line.split()) for line in listed)
    assert after - before - sys.stdlib_module_names <= {'vqmoe', 'vqmoe_vision'}
    assert 'False' in before & after and 'True' in last
    assert Path(path) == wheel / 'vqmoe_vision/.mim/configs/classification/cifar10.py'
    assert Path(path).read_text() == (ROOT / 'configs/classification/cifar10.py').read_text()
    # what comes first is about the run: nothing that is printed where mmseg is imported
    needs, error = done.stderr.splitlines()
    assert "needs: pip install 'vqmoe-vision[train]', or" in needs
    assert error.startswith(f'error: {tmp_path}/dist holds no image')


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


def test_help_and_typos_are_told_by_the_standard_library():
    command = [sys.executable, '-c', ALONE, json.dumps([*SAID])]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    version, *_, last = done.stdout.splitlines()
    ended, modules = json.loads(last)
    assert ended == SAID and version == vqmoe_vision.__version__
    assert not {'torch', 'timm', 'numpy', 'mmengine', 'vqmoe_vision'} & {*modules}


@pytest.mark.parametrize('tool', NAMES)
def test_examples_in_the_help_of_a_tool_are_possible_and_reach_it_as_they_are(tool, monkeypatch):
    *sentences, examples = NAMES[tool]
    assert examples and all(text[0].isupper() and '.' in text for text in sentences)
    script, run_path, ran = TOOLS / f'{tool}.py', runpy.run_path, []
    assert script.is_file()

    def run(path: str, **options: str) -> dict:
        if Path(path).parent != TOOLS:
            return run_path(path, **options)
        ran.append(sys.argv)
        return {}

    monkeypatch.setattr(runpy, 'run_path', run)
    before = [*sys.path]
    for example in examples:
        parser_of(tool).parse_args(shlex.split(example))
        words = [word if word != 'CONFIG' else __file__ for word in shlex.split(example)]
        monkeypatch.setattr(sys, 'argv', ['vqmoe', tool, *words])
        vqmoe.main()
        assert ran.pop() == [str(script), *words]
        assert sys.path == before  # what lies in the user's folder is not imported


STARTS = ['tools/train.py'], ['vqmoe.py', 'train'], ['-m', 'vqmoe'], ['-m', 'vqmoe_vision']


@pytest.mark.parametrize('start', STARTS, ids=' '.join)
def test_no_module_comes_from_the_current_folder(start, tmp_path):
    """`custom_imports` come from the folder of their config, behind what is installed."""
    here, there = tmp_path / 'here', tmp_path / 'there'
    for folder in (here, there):
        folder.mkdir()
        for module in ('torch', 'timm', 'mmengine', 'absent'):
            (folder / f'{module}.py').write_text('raise SystemExit(f"{__file__} was run")')
    config = "_base_ = 'vqmoe_vision::classification/digits/demo/vit_tiny_vqmoe_demo.py'\n"
    (there / 'a.py').write_text(f"{config}custom_imports = dict(imports=['beside'])")
    places = '', str(here), str(there)
    beside = f'import sys\nraise ValueError([path for path in sys.path if path in {places}])'
    (there / 'beside.py').write_text(beside)
    program = [start[0] if start[0] == '-m' else str(ROOT / start[0]), *start[1:]]
    arguments = ['train'] * (start[0] == '-m') + ['../there/a.py']
    ran = [sys.executable, *program, *arguments]
    done = subprocess.run(ran, cwd=here, capture_output=True, text=True)
    assert done.stderr.splitlines()[-1] == f'error: {[str(there)]}'


@pytest.mark.long  # most of a minute, for it draws the whole report
def test_the_demo_trains_draws_and_reports(tmp_path, monkeypatch, capsys):
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


def test_processors_of_one_name_are_told_apart_and_what_chooses_their_kernels(
    tmp_path, monkeypatch
):
    """Two of the machines that the rows of this repository come from are plain AMD EPYC."""
    for variable in provenance._CHOOSE_KERNELS:
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(provenance, '_CPUINFO', tmp_path / 'cpuinfo')
    without = processor()  # as outside Linux
    (tmp_path / 'cpuinfo').write_text('processor\t: 0\nBogoMIPS\t: 50\n')  # as on ARM
    assert processor() == without
    cores = 'processor\t: {}\ncpu family\t: 26\nmodel\t\t: {}\nmodel name\t: AMD EPYC\n\n'
    (tmp_path / 'cpuinfo').write_text(cores.format(0, 2) + cores.format(1, 3))
    name = 'AMD EPYC (family 26, model 2)'
    assert processor() == name
    monkeypatch.setenv('LD_PRELOAD', '/home/one/a.so: /tmp/b.so ')
    monkeypatch.setenv('MKL_CBWR', '')  # as MKL, which takes that for not set
    monkeypatch.setenv('ONEDNN_MAX_CPU_ISA', 'AVX2')
    assert processor() == f'{name}, LD_PRELOAD=a.so:b.so, ONEDNN_MAX_CPU_ISA=AVX2'


def test_a_changed_file_is_marked_unless_it_is_a_row(tmp_path, monkeypatch):
    # a queue writes its rows below docs/results, and each row names the commit it was made at
    package, rows, tools = tmp_path / 'package', tmp_path / 'docs/results', tmp_path / 'tools'
    for folder in (package, rows, tools):
        folder.mkdir(parents=True)
        (folder / 'file').write_text('as committed')
    commands = 'init -q', 'add .', '-c user.name=a -c user.email=a@example.com commit -qm first'
    for command in (*commands, 'config diff.relative true'):
        subprocess.run(['git', *command.split()], cwd=tmp_path, check=True)
    monkeypatch.setattr(provenance, '__file__', str(package / 'provenance.py'))
    clean = commit()
    (rows / 'file').write_text('another row')
    assert clean is not None and commit() == clean
    (tools / 'file').write_text('another program')
    assert commit() == f'{clean}+'
    monkeypatch.setenv('GIT_LITERAL_PATHSPECS', '1')
    assert commit() == f'{clean}+'


MODULES = sorted(
    '.'.join(path.relative_to(ROOT).with_suffix('').parts).removesuffix('.__init__')
    for path in PACKAGE.rglob('*.py')
    if path.name != '__main__.py' and (path.name != 'triton.py' or find_spec('triton'))
)
FACTORY = {'device', 'dtype', 'factory'}  # as everywhere in torch.nn


def exported() -> dict[str, Callable]:
    """Functions and classes of ours by their full name."""
    modules = [importlib.import_module(name) for name in MODULES]
    found = [getattr(module, name) for module in modules for name in getattr(module, '__all__', ())]
    registries = [each for each in vars(registry).values() if isinstance(each, registry.Registry)]
    for each in registries:
        children = [each, *each.children.values()]
        found += [value for child in children for value in child.module_dict.values()]
    for module in modules:
        classes = [value for value in vars(module).values() if inspect.isclass(value)]
        found += [value for value in classes if issubclass(value, (MoeConfig, MoeLayer))]
    return {
        f'{value.__module__}.{value.__qualname__}': value
        for value in found
        if inspect.isclass(value) or inspect.isfunction(value)
        if value.__module__.startswith('vqmoe_vision') and not timm.is_model(value.__name__)
    }


def arguments(value: Any) -> list[str]:
    """Those that a caller passes, of a function or of what builds a class."""
    if is_dataclass(value):  # what it inherits stands in the base, others in a comment beside them
        own, source = inspect.get_annotations(value), inspect.getsource(value)
        names = [field.name for field in fields(value) if field.name in own]
        beside = r'(#.*\n    {0}: |^    {0}: .*#)'
        return [name for name in names if not re.search(beside.format(name), source, re.M)]
    if inspect.isclass(value) and '__init__' not in vars(value):
        return []
    return list(inspect.signature(value).parameters)


@pytest.mark.parametrize('name', sorted(exported()))
def test_every_argument_of_what_is_exported_is_documented(name):
    value = exported()[name]
    names = [each for each in arguments(value) if each not in FACTORY]
    text = inspect.cleandoc(value.__doc__ or '')
    section = re.search(r'^Args:\n(.*?)(?=^\S|\Z)', text, re.MULTILINE | re.DOTALL)
    told = re.findall(r'^    \*{0,2}(\w+):', section[1], re.MULTILINE) if section else []
    assert len(names) < 2 or set(names) <= set(told)


SCRIPTS = Path(sys.prefix) / 'timm-src'
MODEL = '--img-size 32 --num-classes 2 --model-kwargs img_size=32 patch_size=8 embed_dim=32 depth=2'
READ = '--device cpu --batch-size 4 --workers 0'


def test_a_script_finds_the_models_its_arguments_and_its_neighbours(tmp_path):
    folder = tmp_path / 'scripts'
    folder.mkdir()
    (folder / 'neighbour.py').write_text('import timm\nnames = timm.list_models("vit_tiny_*")\n')
    told = '[sys.argv, neighbour.names, ClassificationTask.__name__], __name__ == "__main__"'
    (folder / 'script.py').write_text(
        'import json, sys, neighbour\nfrom timm.task import ClassificationTask\n'
        f'print(json.dumps([{told}]))\nsys.exit(3)\n'
    )
    script, given = 'vqmoe_vision.script', ('scripts/script.py', '-h', '--model', 'x')
    done = run_tool(script, *given, folder=tmp_path)
    (argv, names, task), is_main = json.loads(done.stdout)
    assert argv == [*given] and is_main
    assert {f'vit_tiny_{method}' for method in METHODS} <= set(names)
    assert task == 'MoeClassificationTask'
    assert (done.returncode, done.stderr) == (3, '')
    done = run_tool(script, 'validate.py', folder=tmp_path)
    assert done.stderr == 'script=validate.py is not possible: there is no such file\n'
    assert (done.returncode, done.stdout) == (2, '')


@pytest.mark.long
@pytest.mark.skipif(not (SCRIPTS / 'train.py').exists(), reason="timm's scripts: make timm-scripts")
@pytest.mark.parametrize('method', METHODS)
def test_train_py_trains_experts_over_a_resume(method, tmp_path):
    for name in ('train/red', 'train/blue', 'validation/red', 'validation/blue'):
        (tmp_path / name).mkdir(parents=True)
        for i in range(4):
            Image.new('RGB', (40, 40), Path(name).name).save(tmp_path / name / f'{i}.png')
    model = ['--model', f'vit_tiny_{method}', *MODEL.split(), 'num_heads=2']
    if 'stage1_steps' in METHODS[method].config.option_names():
        model.append('stage1_steps=3')  # of four updates, two of them per epoch
    options = f'{READ} --data-dir . --epochs 2 --warmup-epochs 0 --output out --model-ema'

    def train(name: str, *arguments: str) -> None:
        named = [*options.split(), '--experiment', name, *arguments]
        script = ['-m', 'vqmoe_vision.script', SCRIPTS / 'train.py', *named, *model]
        command = [sys.executable, *script]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert 'MoeClassificationTask: criterion=' in done.stderr
        assert 'training without collect_losses' not in done.stderr

    def learned(path: str) -> dict[str, list[int]]:
        """Values of what counts updates, and of what starts or ends with one."""
        with torch.serialization.safe_globals([argparse.Namespace]):
            state = torch.load(tmp_path / 'out' / path, weights_only=True)['state_dict']
        kinds = ('codebook.updates', 'codebook.started', 'distilled.steps', 'distilled.frozen')
        return {k: [int(v) for name, v in state.items() if name.endswith(k)] for k in kinds}

    train('whole')
    train('resumed', '--resume', 'out/whole/checkpoint-0.pth.tar')
    first = learned('whole/checkpoint-0.pth.tar')
    for last in (learned('whole/last.pth.tar'), learned('resumed/last.pth.tar')):
        for counted, changed in (('codebook.updates', 'started'), ('distilled.steps', 'frozen')):
            layers = len(first[counted])
            assert (first[counted], last[counted]) == ([2] * layers, [4] * layers)
            assert last[f'{counted.partition(".")[0]}.{changed}'] == [1] * layers
