"""A run: one row at one seed, as commands that anybody can repeat."""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope

from vqmoe_vision.engine.checkpoint_files import last_checkpoint
from vqmoe_vision.engine.cli import as_typed, load_config, one_line
from vqmoe_vision.engine.config import parse_options
from vqmoe_vision.engine.model import without_sources
from vqmoe_vision.moe.config import check

from .recipe import recipe_of
from .spec import STARTS, Comparison

WORK_DIR = Path('work_dirs/comparisons')  # unless the command line says otherwise
# the environment of a run's process
ONE_THREAD = {'OMP_NUM_THREADS': '1', 'OMP_WAIT_POLICY': 'PASSIVE'}
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
        given = [STARTS.sub(lambda found: str(self.sources[found[0]][1]), each) for each in given]
        return [*given, f'randomness.seed={self.seed}', RECORD]

    @cached_property
    def sources(self) -> dict[str, tuple['Run', Path]]:
        """The runs that leave what this one starts from, and where, by what options say for it."""
        sources = {}
        for found in STARTS.finditer(' '.join(self.comparison.rows[self.row])):
            assert self.comparison.start is not None
            comparison, row, file = self.comparison.start
            run = Run(comparison, found[1] or row, self.seed, self.root)
            allowed = 'a path without a comma, at which --cfg-options divide a value'
            check(',' not in str(run.folder / file), found[0], str(run.folder / file), allowed)
            sources[found[0]] = run, run.folder / file
        return sources

    @cached_property
    def resolved(self) -> dict[str, Any]:
        """The config with all options merged in, as JSON has it."""
        return as_json(self.merged())

    def merged(self, *more: str) -> Config:
        """As `config`, without importing the modules that the file names."""
        return self.comparison.merged([*self.options, *more])

    def config(self, *more: str) -> Config:
        """The config with all options merged in."""
        return load_config(self.comparison.config, parse_options([*self.options, *more]))

    @cached_property
    def recipe(self) -> str:
        """What its row has to be made by: the same for all seeds, wherever its sources lie."""
        sources = {
            str(file.relative_to(self.root)): f'{r.comparison.name}/{r.row}/{r.recipe}/{file.name}'
            for r, file in self.sources.values()
        }
        try:
            return recipe_of(self.resolved, sources)
        except ValueError as error:
            raise ValueError(self._said(error)) from error

    @property
    def key(self) -> tuple[str, ...]:
        """What has to be equal for a row of another comparison to be this one's too."""
        return self.name, self.recipe, self.comparison.metric, self.comparison.stage

    @cached_property
    def folder(self) -> Path:
        """Its work dir, named by its recipe too: another one never resumes its checkpoints."""
        return self.root / self.comparison.name / f'{self.name}-{self.recipe[:8]}'

    def build(self) -> None:
        """Builds its model without memory for it: a mistake there would end all runs of the row."""
        config = self.merged()
        # of a segmentor the backbone alone, which rows differ in
        model = config.model.get('backbone', config.model)
        try:
            fits = not (model.get('pretrained') and model.get('extra_mlps'))
            check(fits, 'extra_mlps', model.get('extra_mlps'), '0 beside pretrained weights')
            with (
                DefaultScope.overwrite_default_scope(config.get('default_scope', 'mmengine')),
                torch.device('meta'),
            ):
                MODELS.build(without_sources(model))
        except Exception as error:  # whatever a library makes of a value
            raise ValueError(self._said(error)) from error

    def _said(self, error: Exception) -> str:
        said = as_typed(one_line(error), parse_options(self.options))
        return f'comparison {self.comparison.name}: row {self.row}: {said}'

    def train(self, folder: Path, *more: str) -> list[str]:
        """Command line of its training."""
        options = ['--work-dir', str(folder), '--cfg-options', *self.options, *more]
        return ['python', 'tools/train.py', self.comparison.config, *options]

    def test(self, folder: Path) -> list[str]:
        """Command line of the test of its last checkpoint, once that is there."""
        out = ['--work-dir', str(folder / 'test'), '--out', str(folder / 'test.json')]
        given = [str(last_checkpoint(folder)), *out, '--cfg-options', *self.options]
        return ['python', 'tools/test.py', self.comparison.config, *given]


def budget_of(comparison: Comparison) -> str:
    """What all rows of a comparison share: the recipe of its config and options without a row's."""
    return recipe_of(as_json(comparison.merged(comparison.options)))


def as_json(config: Config) -> dict[str, Any]:
    """A config as plain values."""
    return json.loads(json.dumps(config.to_dict(), default=str))
