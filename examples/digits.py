"""Scans of digits that scikit-learn has, and a small model of them, for the other examples."""

import timm
import torch
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset

import vqmoe_vision  # noqa: F401 - registers the models with timm

MODEL = 'vit_tiny_vqmoe'
SIZES = dict(img_size=8, patch_size=2, in_chans=1, embed_dim=48, depth=4, num_heads=3)


def tensors() -> tuple[TensorDataset, TensorDataset]:
    """Images (N, 1, 8, 8) and labels (N,): 1,437 to train with, 360 to test with."""
    images, labels = load_digits(return_X_y=True)
    images = torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8) / 8 - 1
    labels = torch.tensor(labels)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    train, test = order[:-360], order[-360:]
    return TensorDataset(images[train], labels[train]), TensorDataset(images[test], labels[test])


def loader(data: TensorDataset, shuffle: bool = True) -> DataLoader:
    """Batches of 64."""
    order = torch.Generator().manual_seed(0)
    return DataLoader(data, 64, shuffle=shuffle, generator=order)


def build():
    """A model of timm, and its optimizer."""
    torch.manual_seed(0)
    model = timm.create_model(MODEL, num_classes=10, **SIZES)
    return model, torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)


@torch.no_grad()
def accuracy(model, test: TensorDataset) -> float:
    """Percent of the test images that are right."""
    images, labels = test.tensors
    answers = model.eval()(images.to(next(model.parameters()).device))
    return 100 * (answers.argmax(-1).cpu() == labels).float().mean().item()
