"""Scenes of digits, and a training of any model that segments them, for the examples.

The scenes are those of configs/segmentation/segmenter_vit-4x96-vqmoe_mask_1xb64-1k_digits-48x48.py,
and so are crops, batch, rates and the windows of a test. mmsegmentation is not needed.
"""

from itertools import product

import numpy as np
import torch
import torch.nn.functional as F

from vqmoe_vision import collect_losses
from vqmoe_vision.engine.images import digit_scans, digit_scene

CLASSES, SIZE, CROP = 11, 96, 48
ENCODER = dict(img_size=CROP, patch_size=8, depth=4, embed_dim=96, num_heads=3, preset='matched')


def scene(split: str, index: int) -> tuple[np.ndarray, np.ndarray]:
    """Image (96, 96, 3) uint8 and labels (96, 96) uint8: 0, and d + 1 for strokes of digit d."""
    seeds = 0, ('train', 'test', 'dev').index(split), index
    return digit_scene(*digit_scans(split), SIZE, seeds)


def tensors(scenes: list) -> tuple[torch.Tensor, torch.Tensor]:
    """Images (B, 3, H, W), normalised, and labels (B, H, W)."""
    images, labels = (torch.from_numpy(np.stack(part)) for part in zip(*scenes, strict=True))
    return (images.movedim(-1, 1).float() - 76.5) / 89.25, labels.long()


def cut(image: np.ndarray, labels: np.ndarray, rng: np.random.Generator) -> tuple:
    """A square of a scene, of which one class has less than 95 % if ten attempts find such."""
    for _ in range(10):
        top, left = rng.integers(0, SIZE - CROP + 1, 2)
        place = slice(top, top + CROP), slice(left, left + CROP)
        if np.bincount(labels[place].ravel()).max() < 0.95 * CROP**2:
            break
    return image[place], labels[place]


def fit(model: torch.nn.Module, steps: int, seed: int = 0):
    """Trains with the losses of the experts; gives what the last step collected."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4, weight_decay=0.05)
    rates = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda at: min(1, (at + 1) / 30) * (1 - at / steps) ** 0.9
    )
    rng = np.random.default_rng(seed)
    model.train()
    for _ in range(steps):
        chosen = rng.integers(20_000, size=64)
        images, labels = tensors([cut(*scene('train', index), rng) for index in chosen])
        with collect_losses(model, optimizer) as collected:
            loss = F.cross_entropy(model(images), labels) + collected.total()
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        rates.step()
    return collected


@torch.no_grad()
def mean_iou(model: torch.nn.Module, scenes: int = 100) -> float:
    """Percent over test scenes; logits of windows are averaged."""
    model.eval()
    counts = torch.zeros(CLASSES, CLASSES)
    for index in range(scenes):
        images, labels = tensors([scene('test', index)])
        logits, seen = torch.zeros(1, CLASSES, SIZE, SIZE), torch.zeros(SIZE, SIZE)
        places = range(0, SIZE - CROP + 1, CROP // 4)
        for top, left in product(places, places):
            rows, columns = slice(top, top + CROP), slice(left, left + CROP)
            logits[..., rows, columns] += model(images[..., rows, columns])
            seen[rows, columns] += 1
        found = (logits / seen).argmax(1)
        pairs = labels.flatten() * CLASSES + found.flatten()
        counts += pairs.bincount(minlength=CLASSES**2).view(CLASSES, CLASSES)
    right = counts.diag()
    return 100 * (right / (counts.sum(0) + counts.sum(1) - right)).mean().item()
