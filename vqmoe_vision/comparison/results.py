"""What is there of a comparison: rows that count, and those that do not."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from .runs import Run

Usable = dict[tuple[str, int], dict[str, Any]]


@dataclass(frozen=True)
class Results:
    """What is there of a comparison."""

    usable: Usable  # rows that count
    left_out: dict[str, str]  # reasons by file
    missing: list[Run]
    checked: dict[tuple[str, int], str] = field(default_factory=dict)  # commits of right checks

    @property
    def why_none(self) -> str:
        """How a sentence ends that says that none counts."""
        kept = '; '.join(f'{name}: {why}' for name, why in self.left_out.items())
        return f' ({kept})' if kept else ': none is finished, tools/compare.py run trains them'

    def restricted(self, shown: set[tuple[str, int]], every: Iterable[tuple[str, int]]) -> Results:
        """What of these belongs to some runs, and what is said of no single one."""
        hidden = {f'{row}-seed{seed}.json' for row, seed in set(every) - shown}
        return Results(
            {run: content for run, content in self.usable.items() if run in shown},
            {name: why for name, why in self.left_out.items() if name not in hidden},
            [run for run in self.missing if (run.row, run.seed) in shown],
            {run: commit for run, commit in self.checked.items() if run in shown},
        )


def images_seen(content: dict[str, Any]) -> int:
    """How many images a run has been trained on, those that it saw again counted again."""
    loader = content['config'].get('train_dataloader') or {}
    batch = loader.get('batch_size', 1)  # as torch has it
    done = content['iterations']
    samples = content.get('data', {}).get('train', {}).get('samples')
    in_epochs = (content['config'].get('train_cfg') or {}).get('by_epoch')
    if not (samples and in_epochs) or loader.get('drop_last'):
        return batch * done
    epochs, rest = divmod(done, -(-samples // batch))  # the last batch of each is smaller
    return samples * epochs + batch * rest


def rounded(value: Any) -> Any:
    """Numbers to five digits, so that a row is a few kilobytes."""
    if isinstance(value, dict):
        return {name: rounded(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [rounded(inner) for inner in value]
    return float(f'{value:.5g}') if isinstance(value, float) else value
