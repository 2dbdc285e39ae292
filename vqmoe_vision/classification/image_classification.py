"""What all data sets of classification are: images with a transform, and their classes."""

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from mmengine.registry import TRANSFORMS
from torch.utils.data import Dataset

from vqmoe_vision.engine.seeding import seed_sample
from vqmoe_vision.engine.training_data import TrainingPart
from vqmoe_vision.models.normalization import Normalization

from .transforms import normalization_of, normalized_as


class WrappedError(ValueError, AttributeError):
    """A mistake of a user, and to mmengine's runner, which asks for `full_init`, no such method."""


class ImageClassification(Dataset):
    """Pairs of a transformed image (3, H, W) and its class index, of RGB PIL images in `source`."""

    def __init__(
        self,
        source: Sequence,
        classes: Sequence[str],
        transform: dict,
        counts: Sequence[int] | None = None,
        names: Sequence[str] | None = None,
        part: TrainingPart | None = None,
    ) -> None:
        self.source, self.names, self.training_part = source, names, part
        self.metainfo: dict[str, Any] = {'classes': tuple(classes)}
        if counts is not None:
            self.metainfo['train_counts'] = tuple(counts)
        self._config = transform
        self.transform: Callable = TRANSFORMS.build(transform)

    def normalize_as(self, weights: Normalization, field: str, owner: str = 'the weights') -> None:
        """Normalises images as the weights want it, if the config of the transform allows it."""
        found = self.normalization
        if found is not None and found.differing(weights):
            self.transform = normalized_as(self._config, weights, field, owner)

    @property
    def normalization(self) -> Normalization | None:
        """How the transform normalises images; None if it does not as torchvision does."""
        return normalization_of(self.transform)

    @property
    def full_init(self) -> NoReturn:
        """What mmengine's wrappers of data sets call first: this one stands in none."""
        # they would hide its transform from `normalize_as`, and ask for more than it has
        raise WrappedError(
            'dataset.type is a wrapper of data sets, and those of classification stand in none: '
            'train longer in place of RepeatDataset, put the images of several data sets into one '
            'folder per class in place of ConcatDataset'
        )

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        seed_sample(index)
        image, target = self.source[index]
        return self.transform(image.convert('RGB')), int(target)
