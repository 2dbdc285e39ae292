"""Train small models for both tasks on data that needs no download, and draw them: make demo."""

import sys
import time
from pathlib import Path

try:
    import mmcv  # noqa: F401  the second task needs it, minutes later
    import torch
    from mmengine.runner import Runner

    from vqmoe_vision.analysis import patch_experts
    from vqmoe_vision.analysis.cli import analyze
    from vqmoe_vision.analysis.pictures import plot_experts, plot_segmentation
    from vqmoe_vision.engine.checkpoint_files import last_checkpoint
    from vqmoe_vision.engine.cli import ToolRunner, load_config, one_line
    from vqmoe_vision.engine.terminal import shown
except ModuleNotFoundError as missing:
    sys.exit(f"error: {missing}; the demo needs: pip install '.[seg,analyze]'")

WORK_DIR = Path('work_dirs/demo')
DIGITS = 'classification/digits/demo/vit_tiny_vqmoe_demo.py'
SCENES = 'segmentation/segmenter_vit-4x96-vqmoe_mask_1xb64-1k_digits-48x48.py'
# for the report: what the routing did while the model was trained
HISTORY = {'default_hooks.routing_history.type': 'RoutingHistoryHook'}


def main() -> None:
    try:
        told = classify_digits(WORK_DIR / 'classification')
        checkpoint = str(last_checkpoint(WORK_DIR / 'classification'))
        told += segment_scenes(WORK_DIR / 'segmentation', checkpoint)
        print('\n'.join(told))
        scenes = str(last_checkpoint(WORK_DIR / 'segmentation'))
        out = ['--out', str(WORK_DIR / 'report'), '--beside', f'vqmoe_vision::{SCENES}', scenes]
        analyze([f'vqmoe_vision::{DIGITS}', checkpoint, *out])
        report = WORK_DIR / 'report' / 'report.html'
        print(f'\nWhich expert does what, in both: open {report} in a browser')
    except Exception as error:
        if '--debug' in sys.argv:
            raise
        sys.exit(f'error: {one_line(error)}')


def train(config: str, work_dir: Path, options: dict) -> tuple[Runner, dict, str]:
    """Trains and tests; returns last values by name too, and a line of what lies where."""
    settings = load_config(f'vqmoe_vision::{config}', options)
    settings.work_dir = str(work_dir)
    started = time.monotonic()
    runner = ToolRunner.from_cfg(settings)
    with shown(runner, None):
        runner.train()
    seconds = time.monotonic() - started
    last = {'seconds': seconds, **runner.test()}
    last['dead'] = sum(n for name, n in last.items() if name.endswith('/load_unused'))
    places = (
        f'  checkpoint  {last_checkpoint(work_dir)}\n'
        f'  log         {work_dir / runner.timestamp / runner.timestamp}.log'
    )
    return runner, last, places


def classify_digits(work_dir: Path) -> list[str]:
    """Trains a classifier and draws its experts; says what was reached."""
    runner, last, places = train(DIGITS, work_dir, HISTORY)
    draw_experts(runner, work_dir / 'experts.png')
    return [
        '',
        f'Classification: {last["accuracy/top1"]:.1f} % of '
        f'{len(runner.test_dataloader.dataset)} held-out digits, {last["dead"]:.0f} dead experts, '
        f'{last["seconds"]:.0f} seconds',
        places,
        f'  experts     {work_dir / "experts.png"}   which expert took each patch of a test image',
    ]


def draw_experts(runner: Runner, path: Path) -> None:
    """Draws the first held-out digit of every class, as the trained model routes it."""
    dataset = runner.test_dataloader.dataset
    first = {}
    for index, (_, target) in enumerate(dataset.source):
        first.setdefault(int(target), index)
    images = torch.stack([dataset[index][0] for _, index in sorted(first.items())])
    model = runner.model.routed_model.cpu()
    experts = patch_experts(model, images)
    low, high = images.amin(), images.amax()
    images, title = (images - low) / (high - low), 'The expert that each patch went to'
    plot_experts(images, experts, model.moe_config.num_experts, title).savefig(path)


def segment_scenes(work_dir: Path, checkpoint: str) -> list[str]:
    """Trains Segmenter on that classifier's backbone and draws scenes; says what was reached."""
    options = {'model.backbone.checkpoint': checkpoint, **HISTORY}
    runner, last, places = train(SCENES, work_dir, options)
    draw_scenes(runner, work_dir / 'scenes.png')
    return [
        '',
        f'Segmentation, from that checkpoint: {last["mIoU"]:.1f} % mIoU '
        f'({last["aAcc"]:.1f} % aAcc, {last["mAcc"]:.1f} % mAcc) on '
        f'{len(runner.test_dataloader.dataset)} scenes of held-out digits, '
        f'{last["dead"]:.0f} dead experts, {last["seconds"]:.0f} seconds',
        places,
        f'  scenes      {work_dir / "scenes.png"}   images, labels and predictions',
    ]


def draw_scenes(runner: Runner, path: Path, count: int = 8) -> None:
    """Draws scenes of held-out digits, what their pixels are and what the model takes them for."""
    dataset = runner.test_dataloader.dataset
    samples = [dataset[index] for index in range(count)]
    batch = {key: [sample[key] for sample in samples] for key in ('inputs', 'data_samples')}
    runner.model.cpu().eval()
    with torch.inference_mode():
        outputs = runner.model.test_step(batch)
    plot_segmentation(
        torch.stack(batch['inputs']).flip(1) / 255,  # BGR
        {
            'labels': torch.cat([output.gt_sem_seg.data for output in outputs]),
            'predictions': torch.cat([output.pred_sem_seg.data for output in outputs]),
        },
        dataset.metainfo['classes'],
        torch.tensor(dataset.metainfo['palette']) / 255,
        'Scenes of held-out digits',
    ).savefig(path)


if __name__ == '__main__':
    main()
