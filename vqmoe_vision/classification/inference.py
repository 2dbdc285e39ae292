"""Classes of images that need no data set."""

import argparse
import csv
import json
from collections.abc import Sequence
from pathlib import Path

import torch

from vqmoe_vision.engine.checkpoint import classes_of
from vqmoe_vision.engine.cli import load_config, make_folder
from vqmoe_vision.engine.model import load_trained
from vqmoe_vision.moe.config import check

from .datasets import load_image
from .transforms import normalized_as

Ranked = list[tuple[str, float]]  # names of classes and their probabilities, the likeliest first


class TopClasses:
    """What `tools/predict.py` writes of images: `predictions.json` and `predictions.csv`."""

    def __init__(self, args: argparse.Namespace, files: Sequence[Path]) -> None:
        check(args.opacity is None, '--opacity', args.opacity, 'left out, it is for a segmentor')
        config = load_config(args.config, args.cfg_options)
        self._model = load_trained(config, args.checkpoint, args.device)
        self._device = next(self._model.parameters()).device
        count = self._model.num_classes
        self._topk = min(5, count) if args.topk is None else args.topk
        check(1 <= self._topk <= count, '--topk', args.topk, f'from 1 to {count}, the classes')
        named = classes_of(args.checkpoint)
        self._classes = named if len(named) == count else [f'class {i}' for i in range(count)]
        field = 'test_dataloader.dataset.transform'
        transform = config.test_dataloader.dataset.get('transform')
        check(isinstance(transform, dict), field, transform, 'that of an image')
        self._transform = normalized_as(transform, self._model.known_normalization, field)
        self._out, self._found = args.out_dir, dict[str, Ranked]()
        make_folder(self._out)

    @torch.inference_mode()
    def add(self, file: Path) -> None:
        """Classifies an image."""
        image = self._transform(load_image(str(file)))[None].to(self._device)
        shares, places = self._model(image)[0].float().softmax(0).topk(self._topk)
        names = [self._classes[i] for i in places.tolist()]
        self._found[str(file)] = list(zip(names, shares.tolist(), strict=True))

    def end(self) -> str:
        """Writes both files; a line for each image."""
        table = self._out / 'predictions.csv'
        ranked = {
            image: [{'class': name, 'probability': share} for name, share in found]
            for image, found in self._found.items()
        }
        table.with_suffix('.json').write_text(json.dumps(ranked, indent=1) + '\n')
        with table.open('w', newline='') as file:
            rows = csv.writer(file)
            rows.writerow(('image', 'rank', 'class', 'probability'))
            for image, found in self._found.items():
                rows.writerows((image, i, *each) for i, each in enumerate(found, 1))
        lines = [
            f'{image}: {", ".join(f"{name} {share:.3f}" for name, share in found)}'
            for image, found in self._found.items()
        ]
        return '\n'.join([*lines, f'wrote {table} and {table.with_suffix(".json").name}'])
