"""Where a number comes from."""

import subprocess
from pathlib import Path

import pytest

from vqmoe_vision import provenance
from vqmoe_vision.provenance import commit, processor


def test_what_chooses_the_kernels_of_a_processor_stands_beside_its_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for variable in provenance._CHOOSE_KERNELS:
        monkeypatch.delenv(variable, raising=False)
    name = processor()
    monkeypatch.setenv('LD_PRELOAD', '/home/one/a.so: /tmp/b.so ')
    monkeypatch.setenv('MKL_CBWR', '')  # as MKL, which takes that for not set
    monkeypatch.setenv('ONEDNN_MAX_CPU_ISA', 'AVX2')
    assert processor() == f'{name}, LD_PRELOAD=a.so:b.so, ONEDNN_MAX_CPU_ISA=AVX2'


def test_processors_of_one_name_are_told_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two of the machines that the rows of this repository come from are plain AMD EPYC."""
    for variable in provenance._CHOOSE_KERNELS:
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(provenance, '_CPUINFO', tmp_path / 'cpuinfo')
    without = processor()  # as outside Linux
    for core in (0, 1):
        with (tmp_path / 'cpuinfo').open('a') as file:
            file.write(f'processor\t: {core}\ncpu family\t: 26\nmodel\t\t: {2 + core}\n')
            file.write('model name\t: AMD EPYC\n\n')
    assert processor() == 'AMD EPYC (family 26, model 2)'
    (tmp_path / 'cpuinfo').write_text('processor\t: 0\nBogoMIPS\t: 50\n')  # as on ARM
    assert processor() == without


def test_a_changed_file_is_marked_unless_it_is_a_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # a queue writes its rows below docs/results, and each row names the commit it was made at
    package, rows, tools = tmp_path / 'package', tmp_path / 'docs/results', tmp_path / 'tools'
    for folder in (package, rows, tools):
        folder.mkdir(parents=True)
        (folder / 'file').write_text('as committed')
    name = ['-c', 'user.name=test', '-c', 'user.email=test@example.com']
    for arguments in (['init', '-q'], ['add', '.'], [*name, 'commit', '-q', '-m', 'first']):
        subprocess.run(['git', *arguments], cwd=tmp_path, check=True)
    subprocess.run(['git', 'config', 'diff.relative', 'true'], cwd=tmp_path, check=True)
    monkeypatch.setattr(provenance, '__file__', str(package / 'provenance.py'))

    clean = commit()
    (rows / 'file').write_text('another row')
    assert clean is not None and commit() == clean
    (tools / 'file').write_text('another program')
    assert commit() == f'{clean}+'
    monkeypatch.setenv('GIT_LITERAL_PATHSPECS', '1')
    assert commit() == f'{clean}+'
