"""mmseg's encoder-decoder with the auxiliary losses of its backbone, and the graph of its tests.

Legend: B images, H height, W width, C classes, N windows.
"""

import inspect
from collections.abc import Mapping
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from mmengine.config import ConfigDict
from mmengine.dist import broadcast_object_list, get_rank
from mmengine.logging import print_log
from mmengine.structures import PixelData
from mmseg.models import EncoderDecoder
from mmseg.registry import MODELS
from torch import Tensor, nn
from torch.utils.data import DataLoader
from typing_extensions import override

from vqmoe_vision.analysis.source import Source
from vqmoe_vision.engine.model import MoeTrainingMixin, loss_entries
from vqmoe_vision.engine.seeding import drawn_apart
from vqmoe_vision.models.compat import StateDict, below, part_of, without
from vqmoe_vision.models.export import Exportable
from vqmoe_vision.models.fitting import from_mmseg, is_of_mmseg, replaced
from vqmoe_vision.models.normalization import Normalization
from vqmoe_vision.moe.config import check

from . import mmseg_patches
from .backbone import TimmViT
from .datasets import check_label_maps
from .inference import Overlays
from .preprocessor import (
    class_of,
    completed,
    converts_channels,
    follow,
    normalization_of,
    survey_source,
)

# Names in a Segmenter of its authors, rstrudel/segmenter, and in mmseg's.
_DECODER = (
    (r'^decoder\.proj_dec\.', 'decode_head.dec_proj.'),
    (r'^decoder\.proj_(patch|classes)$', r'decode_head.\1_proj.weight'),
    (r'^decoder\.head\.', 'decode_head.conv_seg.'),
    (r'^decoder\.blocks\.', 'decode_head.layers.'),
    (r'^decoder\.', 'decode_head.'),
    (r'\.norm([12])\.', r'.ln\1.'),
    (r'\.attn\.qkv\.', '.attn.attn.in_proj_'),
    (r'\.attn\.proj\.', '.attn.attn.out_proj.'),
    (r'\.mlp\.fc1\.', '.ffn.layers.0.0.'),
    (r'\.mlp\.fc2\.', '.ffn.layers.1.'),
)


@MODELS.register_module()
class MoeEncoderDecoder(MoeTrainingMixin, EncoderDecoder):
    """An `EncoderDecoder` that trains what its `TimmViT` backbone routes.

    Auxiliary losses join mmseg's inside `forward`, and so inside what DDP wraps. Losses and
    statistics are named by the layers of the timm model: `blocks.1.mlp/balance_loss`.

    What neck and heads cannot be built without, and their configs do not give, is taken from the
    backbone: `in_channels`, `out_channels`, `channels`, `embed_dims` and `num_heads`. An auxiliary
    head has the `num_classes` of the decode head.

    Args:
        neck: Config of a neck, as `EncoderDecoder`.
        data_preprocessor: As `EncoderDecoder`, or a config with `from_scratch`, as `completed`: it
            follows the weights.
        **kwargs: As `EncoderDecoder`.

    Raises:
        ValueError: The backbone is not a `TimmViT`, there are several decode heads, an auxiliary
            head has another `num_classes`, or `test_cfg` has what mmseg would pass over.
    """

    predictions = Overlays

    def __init__(
        self,
        neck: dict | None = None,
        data_preprocessor: dict | nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        for name, value in (kwargs.get('test_cfg') or {}).items():
            known = ('mode', 'crop_size', 'stride')  # mmseg passes over all others
            check(name in known, f'model.test_cfg.{name}', value, f'it has {", ".join(known)}')
        init_cfg = kwargs.get('init_cfg')  # of another file mmengine would take what fits
        check(init_cfg is None, 'model.init_cfg', init_cfg, 'left out: load_from=FILE loads all')
        for name, value in {'neck': neck, **kwargs}.items():
            for config in value if isinstance(value, list) else [value]:
                init_cfg = config.get('init_cfg') if isinstance(config, dict) else None
                reads = "'checkpoint': " in str(init_cfg)  # which heads pass over
                check(not reads, f'model.{name}.init_cfg', init_cfg, 'without a checkpoint')
        mmseg_patches.apply()
        self._neck = neck  # mmseg would build it before its width is known
        self._stated: tuple[str, ...] = ('mean', 'std')
        if isinstance(data_preprocessor, dict):
            data_preprocessor, self._stated = completed(data_preprocessor)
        super().__init__(data_preprocessor=data_preprocessor, **kwargs)

    @drawn_apart(0)
    def _init_decode_head(self, decode_head: Any) -> None:
        kind = type(self.backbone)
        check(issubclass(kind, TimmViT), 'model.backbone.type', kind.__name__, "'TimmViT'")
        if self._neck is not None:
            width, levels = self.backbone.model.embed_dim, len(self.backbone.out_indices)
            sizes = dict(in_channels=[width] * levels, out_channels=width, embed_dim=width)
            self.neck = MODELS.build(_completed(self._neck, **sizes))
        check(isinstance(decode_head, dict), 'model.decode_head', decode_head, 'one head')
        super()._init_decode_head(self._fitted(decode_head))

    @drawn_apart(2)
    def init_weights(self) -> None:
        """Starts a new training; neck and heads start alike in all rows at one seed."""
        super().init_weights()
        if (weights := self.backbone.weights_normalization) is not None:
            super().normalize_as(weights)  # a run that resumes may have had another

    def normalize_as(self, normalization: Normalization) -> None:
        """Takes over how images are normalised, and lets the data preprocessor do so."""
        super().normalize_as(normalization)
        known: Any = self.known_normalization  # rounded in the buffer: tests are fed the same bits
        follow(self.data_preprocessor, known, self._stated)
        fed = normalization_of(self.data_preprocessor)
        if fed is not None and fed.differing(known):  # the config states it
            super().normalize_as(fed)

    def normalize_inputs(self, datasets: Mapping) -> None:
        """As `MoeTrainingMixin`: the data preprocessor normalises the images of every data set."""
        if known := self.known_normalization or normalization_of(self.data_preprocessor):
            self.normalize_as(known)

    @drawn_apart(1)
    def _init_auxiliary_head(self, auxiliary_head: Any) -> None:
        several, number = isinstance(auxiliary_head, list), self.num_classes
        configs = auxiliary_head if several else filter(None, [auxiliary_head])
        heads = [self._fitted(config, num_classes=number) for config in configs]
        for own in [head.get('num_classes', number) for head in heads]:
            check(own == number, 'model.auxiliary_head.num_classes', own, f'{number}, as all heads')
        super()._init_auxiliary_head(heads if several else next(iter(heads), None))

    def _fitted(self, head: dict, **values: Any) -> dict:
        """A head's config with what follows from backbone and neck."""
        model: Any = self.backbone.model
        width = getattr(self.neck if self.with_neck else None, 'out_channels', model.embed_dim)
        index = head.get('in_index', -1)
        return _completed(
            head,
            in_channels=width if isinstance(index, int) else [width] * len(index),
            channels=width,
            embed_dims=width,
            num_heads=model.blocks[0].attn.num_heads,
            **values,
        )

    def in_own_names(self, state: StateDict) -> StateDict:
        """As `MoeTrainingMixin`, also of mmseg's own Segmenter, or of its authors'."""
        state = super().in_own_names(state)
        backbone, encoder = (part_of(state, prefix) for prefix in ('backbone.', 'encoder.'))
        if is_of_mmseg(backbone):
            network, theirs, whose = from_mmseg(backbone), 'backbone.', 'mmseg'
            if 'patch_embed.projection.bias' not in backbone:
                whose += '; the stem has no bias there, and one of zeros here'
        elif 'patch_embed.proj.weight' in encoder:
            network, theirs = without(encoder, 'head.'), 'encoder.'
            whose = "rstrudel/segmenter; left out is the encoder's own head"
        else:
            return state
        print_log(f'checkpoint: the names are those of {whose}', logger='current')
        renamed = below('backbone.model.', network)
        for name, value in without(state, theirs).items():
            if name.startswith('decoder.'):
                # projections are linear layers in mmseg's head, and its linear head a convolution
                if name in ('decoder.proj_patch', 'decoder.proj_classes'):
                    value = value.t()
                elif name == 'decoder.head.weight':
                    value = value[:, :, None, None]
                name = replaced(name, _DECODER)
            renamed[name] = value
        return renamed

    @property
    def routed_model(self) -> nn.Module:
        """The timm model in the backbone."""
        return self.backbone.model

    def test_preprocessing(self, dataset: ConfigDict) -> dict:
        """As `MoeTrainingMixin`: images of any size, of which the model's own is named."""
        converted, field = converts_channels(self.data_preprocessor), 'model.data_preprocessor'
        check(converted, f'{field}.bgr_to_rgb', converted, "True: timm's images are RGB")
        stem = self.backbone.model.patch_embed
        return {
            'input_size': (stem.proj.in_channels, *stem.img_size),
            'crop_pct': 1.0,
            'crop_mode': 'center',
            'interpolation': 'bilinear',
        }

    def exportable(self, size: tuple[int, int] | None = None) -> Exportable:
        """As `MoeTrainingMixin`: logits and label maps of images of one size, or the window."""
        height, width = size or self._window()
        known = self.known_normalization or normalization_of(self.data_preprocessor)
        about: dict = {k: list(v) for k, v in vars(known).items()} if known else {}
        about['channels'] = 'RGB' if converts_channels(self.data_preprocessor) else 'BGR'
        graph = SegmentorGraph(self, (height, width))
        return Exportable(graph, (3, height, width), ('logits', 'labels'), about)

    def _window(self) -> tuple[int, int]:
        return self.test_cfg.get('crop_size') or self.backbone.model.patch_embed.img_size

    @override
    def check_batches(self, loader: DataLoader) -> None:
        problem: list[ValueError | None] = [None]
        if get_rank() == 0:  # the others hear of it
            try:
                check_label_maps(loader.dataset, self.decode_head.ignore_index)
            except ValueError as error:
                problem = [error]
        broadcast_object_list(problem)
        if problem[0] is not None:
            raise problem[0]

    def source(self, dataset: Any, folder: str | None = None) -> Source:
        """As the classifier's, what one window of a test sees."""
        return survey_source(dataset, self.data_preprocessor, self._window(), folder)

    def encode_decode(self, inputs: Tensor, batch_img_metas: list[dict]) -> Tensor:
        """As mmseg's, where a map covers more than the images (B, 3, H, W), as in last patches."""
        height, width = (int(side) for side in inputs.shape[2:])
        covered = torch.Size(self._covered(height, width))  # of this type: heads resize to it
        metas = [{**meta, 'img_shape': covered} for meta in batch_img_metas]
        return super().encode_decode(inputs, metas)[..., :height, :width]

    def _covered(self, height: int, width: int) -> tuple[int, int]:
        """What the maps of an image cover, which is whole patches."""
        rows, columns = self.backbone.model.patch_embed.patch_size
        return -(-height // rows) * rows, -(-width // columns) * columns

    def _labelled_as_covered(self, data_samples: list) -> list:
        """Samples with label maps as large as what feature maps cover; what is new is ignored."""
        found = [sample.clone() for sample in data_samples]
        for sample in found:
            labels = sample.gt_sem_seg.data
            (height, width), (rows, columns) = labels.shape[-2:], self._covered(*labels.shape[-2:])
            if any(sides := (0, columns - width, 0, rows - height)):
                filled = F.pad(labels, sides, value=self._ignored_by_all())
                sample.gt_sem_seg = PixelData(data=filled)
        return found

    def _ignored_by_all(self) -> int:
        ignored = self.decode_head.ignore_index
        others: Any = self.auxiliary_head if self.with_auxiliary_head else []
        allowed = f'{ignored}, as of the decode head, for crops that are no multiples of a patch'
        for head in others if isinstance(others, list | nn.ModuleList) else [others]:
            index = head.ignore_index
            check(index == ignored, 'model.auxiliary_head.ignore_index', index, allowed)
        return ignored

    def loss(self, inputs: Tensor, data_samples: list) -> dict[str, Tensor]:
        """Each auxiliary loss, then mmseg's losses and accuracy, of normalised (B, 3, H, W)."""
        with self.collect() as collected:
            found = super().loss(inputs, self._labelled_as_covered(data_samples))
            _, numbers = self.parse_losses(found)  # of an entry that is a list, too
            losses = {name: numbers[name] for name in found if 'loss' in name}
            collected.add(losses, len(inputs))
            return loss_entries(collected) | {k: v for k, v in found.items() if k not in losses}

    def predict(self, inputs: Tensor, data_samples: list | None = None) -> list:
        """As mmseg's, and counts the routing."""
        with self.collect():
            return super().predict(inputs, data_samples)


def _completed(config: dict, **values: Any) -> dict:
    """A config with those of `values` that it lacks and its class cannot be built without."""
    kind = class_of(config)
    if kind is None:  # the registry says what is wrong
        return config
    needed: dict[str, bool] = {}
    for base in kind.__mro__:  # each hands on to the next what it has no name for
        own = inspect.signature(base.__init__).parameters
        needed = {n: p.default is p.empty for n, p in own.items()} | needed
        if not any(p.kind is p.VAR_KEYWORD for p in own.values()):
            break
    return {**{name: value for name, value in values.items() if needed.get(name)}, **config}


class SegmentorGraph(nn.Module):
    """What mmseg predicts of normalised images of one size, as tensors alone."""

    def __init__(self, segmentor: EncoderDecoder, size: tuple[int, int]) -> None:
        super().__init__()
        check(min(size) >= 1, 'size', size, 'two positive numbers of pixels, height and width')
        self.segmentor, self.size = segmentor, size
        preprocessor: Any = segmentor.data_preprocessor
        # pixels that are added at the right and below, as mmseg's tests do
        config = getattr(preprocessor, 'test_cfg', None) or {}
        divisor = config.get('size_divisor') or 1
        padded = config.get('size') or [-(-side // divisor) * divisor for side in size]
        self.padding = (padded[1] - size[1], padded[0] - size[0])
        check(min(self.padding) >= 0, 'size', size, f'at most {tuple(padded)}, of padded images')
        self.pad_value = float(getattr(preprocessor, 'pad_val', 0))
        test, whole = segmentor.test_cfg, (padded, padded)
        crops, strides = (test.crop_size, test.stride) if test.mode == 'slide' else whole
        self.windows = list(product(*map(_places, padded, crops, strides)))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised images (B, 3, H, W) to logits (B, C, H, W) and labels (B, H, W) int64."""
        right, below = self.padding
        padded = F.pad(images, (0, right, 0, below), value=self.pad_value)
        # all windows of all images are one batch
        cut = torch.stack([padded[:, :, rows, columns] for rows, columns in self.windows])
        logits = self.segmentor.encode_decode(cut.flatten(0, 1), [{}])
        if len(self.windows) > 1:
            logits = self._averaged(logits.unflatten(0, (len(self.windows), -1)), padded)
        logits = logits[:, :, : self.size[0], : self.size[1]]
        if logits.shape[1] == 1:  # mmseg's head of two classes
            return logits, (logits.sigmoid() > self.segmentor.decode_head.threshold)[:, 0].long()
        return logits, logits.argmax(dim=1)

    def _averaged(self, logits: Tensor, padded: Tensor) -> Tensor:
        """Windows (N, B, C, h, w) put together: (B, C, H, W)."""
        height, width = (int(side) for side in padded.shape[2:])
        total: Any = 0
        count = torch.zeros(height, width)
        for window, (rows, columns) in zip(logits, self.windows, strict=True):
            sides = columns.start, width - columns.stop, rows.start, height - rows.stop
            total = total + F.pad(window, sides)
            count[rows, columns] += 1
        return total / count


def _places(side: int, window: int, stride: int) -> list[slice]:
    """As mmseg: the last window ends with the image; one that is larger than it is cut."""
    steps = range(max(side - window + stride - 1, 0) // stride + 1)
    ends = (min(step * stride + window, side) for step in steps)
    return [slice(max(end - window, 0), end) for end in ends]
