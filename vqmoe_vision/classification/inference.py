"""Classes of images that need no data set."""

import argparse
import csv
import json
from collections.abc import Sequence
from io import StringIO
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch

from vqmoe_vision.engine.checkpoint import classes_of
from vqmoe_vision.engine.checkpoint_files import write_atomically
from vqmoe_vision.engine.cli import load_config, make_folder
from vqmoe_vision.engine.escaping import as_cell, printable
from vqmoe_vision.engine.model import load_trained
from vqmoe_vision.moe.config import check

from .datasets import load_image
from .transforms import normalized_as


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
        self._file, self._rows = args.out_dir / 'predictions.csv', list[dict[str, Any]]()
        make_folder(args.out_dir)

    @torch.inference_mode()
    def add(self, file: Path) -> None:
        """Classifies an image."""
        image = self._transform(load_image(str(file)))[None].to(self._device)
        shares, places = self._model(image)[0].float().softmax(0).topk(self._topk)
        ranked = enumerate(zip(places.tolist(), shares.tolist(), strict=True), 1)
        self._rows += [
            {'image': str(file), 'rank': rank, 'class': self._classes[place], 'probability': share}
            for rank, (place, share) in ranked
        ]

    def end(self) -> str:
        """Writes both files; a line for each image."""
        write_atomically(self._file.with_suffix('.json'), json.dumps(self._rows, indent=1).encode())
        table = csv.DictWriter(text := StringIO(), ('image', 'rank', 'class', 'probability'))
        table.writeheader()
        for row in self._rows:
            table.writerow(row | {name: as_cell(row[name]) for name in ('image', 'class')})
        write_atomically(self._file, text.getvalue().encode())
        lines = [
            f'{image}: ' + ', '.join('{class} {probability:.3f}'.format_map(row) for row in rows)
            for image, rows in groupby(self._rows, itemgetter('image'))
        ]
        return '\n'.join(map(printable, [*lines, f'wrote {self._file} and predictions.json']))
