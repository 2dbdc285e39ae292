"""Train small models for both tasks on data that needs no download, and draw them: make demo."""

import argparse
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
    from vqmoe_vision.arguments import parser_of
    from vqmoe_vision.engine.checkpoint_files import last_checkpoint
    from vqmoe_vision.engine.cli import ToolRunner, load_config, run
    from vqmoe_vision.engine.terminal import shown
except ModuleNotFoundError as missing:
    sys.exit(f"error: {missing}; the demo needs: pip install '.[seg,analyze]'")

WORK_DIR = Path('work_dirs/demo')
DIGITS = 'classification/digits/demo/vit_tiny_vqmoe_demo.py'
SCENES = 'segmentation/segmenter_vit-4x96-vqmoe_mask_1xb64-1k_digits-48x48.py'
# for the report: what the routing did while the model was trained
HISTORY = {'default_hooks.routing_history.type': 'RoutingHistoryHook'}
# a tenth of each training
QUICK = {
    DIGITS: {'train_cfg.max_epochs': 4, 'train_cfg.val_interval': 2},
    SCENES: {'train_cfg.max_iters': 100, 'train_cfg.val_interval': 50},
}


def main() -> None:
    run(parser_of('demo'), None, show)


def show(args: argparse.Namespace) -> None:
    """Trains both and makes the report; ends with a table and where pictures are."""
    classifier = train(DIGITS, WORK_DIR / 'classification', args.quick, HISTORY)
    experts = WORK_DIR / 'classification/experts.png'
    draw_experts(classifier[0], experts)
    checkpoint = str(last_checkpoint(WORK_DIR / 'classification'))
    options = {'model.backbone.checkpoint': checkpoint, **HISTORY}
    segmentor = train(SCENES, WORK_DIR / 'segmentation', args.quick, options)
    scenes = WORK_DIR / 'segmentation/scenes.png'
    draw_scenes(segmentor[0], scenes)
    trained = str(last_checkpoint(WORK_DIR / 'segmentation'))
    out = ['--out', str(WORK_DIR / 'report'), '--beside', f'vqmoe_vision::{SCENES}', trained]
    analyze([f'vqmoe_vision::{DIGITS}', checkpoint, *out])
    lines = [('trained', 'score', 'test images', 'dead experts', 'seconds', 'checkpoint')]
    scores = ('accuracy/top1', '% top-1', checkpoint), ('mIoU', '% mIoU', trained)
    for (runner, last), (name, unit, file) in zip((classifier, segmentor), scores, strict=True):
        kind, images = type(runner.model).__name__, len(runner.test_dataloader.dataset)
        numbers = str(images), f'{last["dead"]:.0f}', f'{last["seconds"]:.0f}'
        lines.append((kind, f'{last[name]:.1f} {unit}', *numbers, file))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    print()
    for line in lines:
        print('  '.join(map(str.ljust, line, widths)).rstrip())
    print(f'\nWhich expert took each patch of a digit  {experts}')
    print(f'Scenes, their labels and predictions     {scenes}')
    print(f'Which expert does what, in a browser     {WORK_DIR / "report/report.html"}')
    page = f'vqmoe export {WORK_DIR / "classification"} work_dirs/page --web'
    print(f'The same for a picture of yours          {page}')


def train(config: str, work_dir: Path, quick: bool, options: dict) -> tuple[Runner, dict]:
    """Trains and tests; returns last values by name too."""
    more = QUICK[config] if quick else {}
    settings = load_config(f'vqmoe_vision::{config}', {**options, **more})
    settings.work_dir = str(work_dir)
    started = time.monotonic()
    runner = ToolRunner.from_cfg(settings)
    with shown(runner, None if sys.stdout.isatty() else 'brief'):
        runner.train()
        last = {'seconds': time.monotonic() - started, **runner.test()}
    last['dead'] = sum(n for name, n in last.items() if name.endswith('/load_unused'))
    return runner, last


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
