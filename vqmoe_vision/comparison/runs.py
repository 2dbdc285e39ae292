"""A run: one row at one seed, as commands that anybody can repeat."""

from __future__ import annotations

import hashlib
import json
import shlex
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from mmengine.config import Config

from vqmoe_vision.engine.checkpoint_files import BEST, POINTER, last_checkpoint
from vqmoe_vision.engine.cli import load_config
from vqmoe_vision.engine.options import flat, merge_options, parse_options
from vqmoe_vision.models.create import options_in_full
from vqmoe_vision.moe.config import check

from .spec import STARTS, Comparison

WORK_DIR = Path('work_dirs/comparisons')  # unless the command line says otherwise
# the environment of a run's process
ONE_THREAD = {'OMP_NUM_THREADS': '1', 'OMP_WAIT_POLICY': 'PASSIVE'}
# What keeps, logs and draws a run, or is of tests with --tta, which no row has: it cannot change
# what a run gives.
_KEEPING = (
    'default_hooks.checkpoint.',
    'default_hooks.logger.',
    'default_hooks.routing_history.',
    'default_hooks.visualization.',
    'log_processor.',
    'tta_model.',
    'tta_pipeline',
    'visualizer.',
)
RECORD = 'default_hooks.record.type=RunRecordHook'


@dataclass(frozen=True)
class Run:
    """One row of a comparison at one seed."""

    comparison: Comparison
    row: str
    seed: int  # of everything that is drawn
    root: Path  # folder of all comparisons' runs

    @property
    def name(self) -> str:
        """Names its file of results."""
        return f'{self.row}-seed{self.seed}'

    @property
    def options(self) -> list[str]:
        """All of `--cfg-options`."""
        given = [*self.comparison.options, *self.comparison.rows[self.row]]
        files = {text: str(file) for text, (_, file) in self.sources.items()}
        given = [STARTS.sub(lambda found: files[found[0]], option) for option in given]
        return [*given, f'randomness.seed={self.seed}', RECORD]

    @cached_property
    def sources(self) -> dict[str, tuple[Run, Path]]:
        """The runs that leave what this one starts from, and where, by what options say for it."""
        start = self.comparison.start
        if start is None:  # no row of the comparison says such a thing
            return {}
        sources = {}
        for found in STARTS.finditer(' '.join(self.comparison.rows[self.row])):
            run = Run(start.comparison, found[1] or start.row, self.seed, self.root)
            file = run.folder / start.file
            allowed = 'a path without a comma, at which --cfg-options divide a value'
            check(',' not in str(file), found[0], str(file), allowed)
            sources[found[0]] = run, file
        return sources

    @cached_property
    def resolved(self) -> dict[str, Any]:
        """The config with all options merged in, as JSON has it."""
        return json.loads(json.dumps(self.merged().to_dict(), default=str))

    def merged(self, *more: str) -> Config:
        """As `config`, without importing the modules that the file names."""
        config = deepcopy(self.comparison.base)
        merge_options(config, parse_options([*self.options, *more]))
        return config

    def config(self, *more: str) -> Config:
        """The config with all options merged in."""
        return load_config(self.comparison.config, parse_options([*self.options, *more]))

    @cached_property
    def moe_options(self) -> dict[str, Any]:
        """Options of its MoE layers in full, as JSON has them; a config leaves most to defaults."""
        model = self.resolved['model']
        return json.loads(json.dumps(options_in_full(model.get('backbone', model))))

    def counting(self, config: dict[str, Any]) -> dict[str, Any]:
        """All of a config that decides what this run gives."""
        values = {n: v for n, v in flat(config).items() if not n.startswith(_KEEPING)}
        # what it starts from counts by the end of its path, wherever the root is or was
        for _, file in self.sources.values():
            inside = file.relative_to(self.root).as_posix()
            for name, value in values.items():
                if isinstance(value, str) and f'/{value}'.endswith(f'/{inside}'):
                    values[name] = str(WORK_DIR / inside)
        return values

    @cached_property
    def folder(self) -> Path:
        """Its work dir, named by what is run too: another config never resumes its checkpoints."""
        content = json.dumps(self.counting(self.resolved), sort_keys=True)
        digest = hashlib.sha256(content.encode()).hexdigest()[:8]
        return self.root / self.comparison.name / f'{self.name}-{digest}'

    def train(self, folder: Path, *more: str) -> list[str]:
        """Command line of its training."""
        options = ['--work-dir', str(folder), '--cfg-options', *self.options, *more]
        return ['python', 'tools/train.py', self.comparison.config, *options]

    def test(self, folder: Path) -> list[str]:
        """Command line of the test of its last checkpoint, once that is there."""
        return self._test(folder, str(last_checkpoint(folder)))

    def _test(self, folder: Path, checkpoint: str) -> list[str]:
        out = ['--work-dir', str(folder / 'test'), '--out', str(folder / 'test.json')]
        command = ['python', 'tools/test.py', self.comparison.config, checkpoint, *out]
        return [*command, '--cfg-options', *self.options]

    def line(self, tested: bool = True, leaves: Path | None = None) -> str:
        """Training, resumed where there is a checkpoint, and test as one line for a shell."""
        folder = self.folder
        quoted, last = (shlex.quote(str(path)) for path in (folder, folder / POINTER))
        # what is trained is not trained again: its record would have the commit of today
        ends = [folder / 'run.json', *([] if leaves is None else [leaves])]
        trained = ' && '.join(f'test -e {shlex.quote(str(file))}' for file in ends)
        train = shlex.join(self.train(folder))
        # as `candidates`: whatever ended the run may have done so before the pointer was written
        resume = f"$(ls {quoted} | grep '[.]pth$' | grep -qv '^{BEST}' && echo --resume)"
        # before the options, which take all that follows them
        train = train.replace(' --work-dir ', f' {resume} --work-dir ', 1)
        work = f'{{ {trained} || OMP_NUM_THREADS=1 {train}; }}'
        if tested:
            test = shlex.join(self._test(folder, 'CHECKPOINT'))
            name = f'"$(basename "$(cat {last})")"'  # as `last_checkpoint`
            test = test.replace(' CHECKPOINT ', f' {quoted}/{name} ', 1)
            work += f' && OMP_NUM_THREADS=1 {test}'
        busy = f'echo {quoted} is worked on already >&2; exit 1'
        return f'mkdir -p {quoted} && (flock -n 9 || {{ {busy}; }}; {work}) 9>{quoted}/lock'
