"""mmseg's encoder-decoder with the auxiliary losses of its backbone."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from mmengine.config import ConfigDict
from mmengine.logging import print_log
from mmengine.structures import PixelData
from mmseg.models import EncoderDecoder
from mmseg.registry import MODELS
from torch import Tensor, nn

from vqmoe_vision.analysis.source import Source
from vqmoe_vision.engine.model import MoeTrainingMixin, loss_entries
from vqmoe_vision.engine.seeding import drawn_apart
from vqmoe_vision.models.compat import StateDict, part_of
from vqmoe_vision.models.export import Exportable
from vqmoe_vision.models.normalization import Normalization
from vqmoe_vision.moe.config import check

from . import mmseg_patches
from .backbone import TimmViT
from .export import SegmentorGraph
from .preprocessor import class_of, completed, converts_channels, follow, normalization_of
from .published import in_our_names
from .source import source


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

    def __init__(
        self,
        neck: dict[str, Any] | None = None,
        data_preprocessor: dict[str, Any] | nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        for name, value in (kwargs.get('test_cfg') or {}).items():
            known = ('mode', 'crop_size', 'stride')  # mmseg passes over all others
            check(name in known, f'model.test_cfg.{name}', value, f'it has {", ".join(known)}')
        allowed = 'left out: load_from=FILE loads all, model.backbone.checkpoint=FILE starts a part'
        init_cfg = kwargs.get('init_cfg')  # of another file mmengine would take what fits
        check(init_cfg is None, 'model.init_cfg', init_cfg, allowed)
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
            width = self.backbone.model.embed_dim
            levels = [width] * len(self.backbone.out_indices)
            sizes = dict(in_channels=levels, out_channels=width, embed_dim=width)
            self.neck = MODELS.build(_completed(self._neck, **sizes))
        check(isinstance(decode_head, dict), 'model.decode_head', decode_head, 'one head')
        super()._init_decode_head(self._fitted(decode_head))

    @drawn_apart(2)
    def init_weights(self) -> None:
        """Starts a new training; neck and heads start alike in all rows at one seed."""
        super().init_weights()
        weights = self.backbone.weights_normalization
        if weights is not None:  # a run that resumes may have had another
            super().normalize_as(weights)

    def normalize_as(self, normalization: Normalization) -> None:
        """Takes over how images are normalised, and lets the data preprocessor do so."""
        super().normalize_as(normalization)
        known = self.known_normalization  # as rounded in the buffer: tests are fed the same bits
        assert known is not None
        follow(self.data_preprocessor, known, self._stated)
        fed = normalization_of(self.data_preprocessor)
        if fed is not None and fed.differing(known):  # the config states it
            super().normalize_as(fed)

    def normalize_inputs(self, datasets: Mapping[str, Any]) -> None:
        """As `MoeTrainingMixin`: the data preprocessor normalises the images of every data set."""
        known = self.known_normalization or normalization_of(self.data_preprocessor)
        if known is not None:
            self.normalize_as(known)

    @drawn_apart(1)
    def _init_auxiliary_head(self, auxiliary_head: Any) -> None:
        several = isinstance(auxiliary_head, list)
        heads = []
        for config in auxiliary_head if several else filter(None, [auxiliary_head]):
            heads.append(head := self._fitted(config, num_classes=self.num_classes))
            own, number = head.get('num_classes', self.num_classes), self.num_classes
            check(own == number, 'model.auxiliary_head.num_classes', own, f'{number}, as all heads')
        super()._init_auxiliary_head(heads if several else next(iter(heads), None))

    def _fitted(self, head: dict[str, Any], **values: Any) -> dict[str, Any]:
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
        return in_our_names(super().in_own_names(state))[0]

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        if note := in_our_names(part_of(state_dict, prefix))[1]:
            print_log(f'checkpoint: {note}', logger='current')
        super()._load_from_state_dict(state_dict, prefix, *args)

    @property
    def routed_model(self) -> nn.Module:
        """The timm model in the backbone."""
        return self.backbone.model

    def test_preprocessing(self, dataset: ConfigDict) -> dict[str, Any]:
        """As `MoeTrainingMixin`: images of any size, of which the model's own is named."""
        converted = converts_channels(self.data_preprocessor)
        allowed = "True: mmseg's images are BGR, timm's are RGB"
        check(converted, 'model.data_preprocessor.bgr_to_rgb', converted, allowed)
        stem = self.backbone.model.patch_embed
        return {
            'input_size': (stem.proj.in_channels, *stem.img_size),
            'crop_pct': 1.0,
            'crop_mode': 'center',
            'interpolation': 'bilinear',
        }

    def exportable(self, size: tuple[int, int] | None = None) -> Exportable:
        """As `MoeTrainingMixin`: logits and label maps of images of one size, or the window."""
        own = self.test_cfg.get('crop_size') or self.backbone.model.patch_embed.img_size
        height, width = size or own
        known = self.known_normalization or normalization_of(self.data_preprocessor)
        converted = converts_channels(self.data_preprocessor)
        numbers = {} if known is None else {k: list(v) for k, v in vars(known).items()}
        about = {'channels': 'RGB' if converted else 'BGR', **numbers}
        graph = SegmentorGraph(self, (height, width))
        return Exportable(graph, (3, height, width), ('logits', 'labels'), about)

    def source(self, dataset: ConfigDict, folder: str | None = None) -> Source:
        """Images for a survey of the routing: what one window of a test sees.

        Args:
            dataset: Config of the data set of its tests.
            folder: Images without labels in its place.
        """
        size = self.test_cfg.get('crop_size') or self.backbone.model.patch_embed.img_size
        return source(dataset, self.data_preprocessor, size, folder)

    def encode_decode(self, inputs: Tensor, batch_img_metas: list[dict]) -> Tensor:
        """As mmseg's, where a map covers more than the images (B, 3, H, W), as in last patches."""
        height, width = (int(side) for side in inputs.shape[2:])
        covered = self._covered(height, width)
        if covered == (height, width):
            return super().encode_decode(inputs, batch_img_metas)
        # of this type it is what mmseg's heads resize to
        metas = [{**meta, 'img_shape': torch.Size(covered)} for meta in batch_img_metas]
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
            height, width = labels.shape[-2:]
            rows, columns = self._covered(height, width)
            sides = 0, columns - width, 0, rows - height
            if any(sides):
                filled = F.pad(labels, sides, value=self.decode_head.ignore_index)
                sample.gt_sem_seg = PixelData(data=filled)
        return found

    def loss(self, inputs: Tensor, data_samples: list) -> dict[str, Tensor]:
        """Each auxiliary loss, then mmseg's losses and accuracy, of normalised (B, 3, H, W)."""
        with self.collect() as collected:
            found = super().loss(inputs, self._labelled_as_covered(data_samples))
            numbers = self.parse_losses(found)[1]  # of an entry that is a list, too
            losses = {name: numbers[name] for name in found if 'loss' in name}
            collected.add(losses, len(inputs))
            others = {name: value for name, value in found.items() if name not in losses}
            return {**loss_entries(collected), **others}

    def predict(self, inputs: Tensor, data_samples: list | None = None) -> list:
        """As mmseg's, and counts the routing."""
        with self.collect():
            return super().predict(inputs, data_samples)


def _completed(config: dict[str, Any], **values: Any) -> dict[str, Any]:
    """A config with those of `values` that it lacks and its class cannot be built without."""
    kind = class_of(config)
    if kind is None:  # the registry says what is wrong
        return config
    parameters: dict[str, inspect.Parameter] = {}
    for base in kind.__mro__:  # each hands on to the next what it has no name for
        own = inspect.signature(base.__init__).parameters
        parameters = {**own, **parameters}
        if not any(p.kind is p.VAR_KEYWORD for p in own.values()):
            break
    needed = {n for n, p in parameters.items() if p.default is p.empty}
    return {**{name: value for name, value in values.items() if name in needed}, **config}
