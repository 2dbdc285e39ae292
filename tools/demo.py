"""Train a small model on data that needs no download, and draw what its experts took: make demo."""

import re
import sys
import time
from pathlib import Path

import torch
from mmengine.runner import Runner

from vqmoe_vision.analysis import patch_experts
from vqmoe_vision.analysis.curves import curves, newest_scalars, plot_curves, read_scalars
from vqmoe_vision.analysis.pictures import plot_experts
from vqmoe_vision.engine.cli import load_config, one_line

ROOT = Path(__file__).parents[1]
WORK_DIR = ROOT / 'work_dirs' / 'demo'


def main() -> None:
    try:
        print('\n'.join(classify_digits()))
    except Exception as error:
        if '--debug' in sys.argv:
            raise
        sys.exit(f'error: {one_line(error)}')


def classify_digits() -> list[str]:
    """Trains, draws, and says what was reached."""
    started = time.monotonic()
    config = load_config(str(ROOT / 'configs/classification/digits/demo/vit_tiny_vqmoe_demo.py'))
    config.work_dir = str(WORK_DIR)
    runner = Runner.from_cfg(config)
    runner.train()
    seconds = time.monotonic() - started
    name = config.model.model_name

    records = read_scalars(newest_scalars(WORK_DIR))
    plot_curves(records, f'{name} on scanned digits').savefig(WORK_DIR / 'curves.png')
    draw_experts(runner)
    last = {scalar: values[-1] for scalar, (_, values) in curves(records).items()}
    dead = sum(n for scalar, n in last.items() if re.fullmatch('val/.*/dead_experts', scalar))
    return [
        '',
        f'{name} reached {last["accuracy/top1"]:.1f} % on '
        f'{len(runner.val_dataloader.dataset)} held-out digits in {seconds:.0f} seconds; '
        f'{dead:.0f} dead experts.',
        f'checkpoint  {(WORK_DIR / "last_checkpoint").read_text()}',
        f'log         {WORK_DIR / runner.timestamp / runner.timestamp}.log',
        f'curves      {WORK_DIR / "curves.png"}',
        f'experts     {WORK_DIR / "experts.png"}   which expert took each patch of a test image',
    ]


def draw_experts(runner: Runner) -> None:
    """Draws the first held-out digit of every class, as the trained model routes it."""
    dataset = runner.val_dataloader.dataset
    first = {}
    for index, (_, target) in enumerate(dataset.source):
        first.setdefault(int(target), index)
    images = torch.stack([dataset[index][0] for _, index in sorted(first.items())])
    model = runner.model.routed_model.cpu()
    experts = patch_experts(model, images)
    low, high = images.amin(), images.amax()
    plot_experts(
        (images - low) / (high - low),
        experts,
        model.moe_config.num_experts,
        'Held-out digits, and the expert that each patch went to',
    ).savefig(WORK_DIR / 'experts.png')


if __name__ == '__main__':
    main()
