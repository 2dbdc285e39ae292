"""A classifier around any timm model, and images for a survey of its routing.

Legend: B images, N tokens, D embed_dim, C classes.
"""

import math
from collections.abc import Mapping
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from typing import Any

import torch
from mmengine.config import ConfigDict
from mmengine.dataset import InfiniteSampler
from mmengine.logging import print_log
from mmengine.model import BaseModel
from mmengine.registry import DATASETS, MODELS
from timm.data import Mixup
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.models.eva import EvaBlock
from timm.models.vision_transformer import Block
from torch import nn
from torch.utils.data import DataLoader

from vqmoe_vision.analysis.source import Sample, Source, image_files
from vqmoe_vision.engine.model import MoeTrainingMixin, loss_entries, start_model
from vqmoe_vision.models.create import create_to_start
from vqmoe_vision.models.export import Exportable
from vqmoe_vision.models.layers import Convertible, Transformer
from vqmoe_vision.moe.config import check, check_type

from .datasets import ImageClassification, load_image
from .inference import TopClasses
from .transforms import normalization_of, normalized_as, preprocessing_of

_TRANSFORM = 'test_dataloader.dataset.transform'


@MODELS.register_module()
class Classifier(MoeTrainingMixin, BaseModel):
    """Trains a timm model, dense or with MoE layers, on images and class labels.

    Auxiliary losses are added inside `forward`, and so inside what DDP wraps.

    Args:
        model_name: Name of a timm model.
        num_classes: Number of classes C.
        mixup: Keyword arguments of `timm.data.Mixup`, such as `mixup_alpha` and `cutmix_alpha`; it
            mixes pairs of images, and refuses a training with an odd batch.
        label_smoothing: Share of the target that is spread over all classes, below 1.
        data_preprocessor: mmengine's; by default moves the batch to the device, without waiting.
        checkpoint: File for a vision transformer to start from, with any number of classes: of a
            classification or segmentation run of this package (.pth), of timm (.pth or
            .safetensors), or of mmseg's ViT (.pth). Experts are made of the MLPs of a dense one.
            Read when training starts, not for tests.
        features: The same of a dense model of the same shape, for a method that decides by
            features of the image; None where the model starts from one.
        grad_checkpointing: Compute blocks again in the backward pass instead of storing them.
        stream_loss: `weight` of the mean square of the residual stream as one more loss, and the
            `blocks` before whose MLPs it is taken (arXiv:1708.01009); None for no such loss.
        moe: Options of the MoE layers, as `create_model`; None for a dense model.
        extra_mlps: What a dense model is widened by, as `create_model`.
        **model_kwargs: Keyword arguments as `create_model`; `upcycling` is refused by a training
            that starts from no weights.

    Raises:
        ValueError: The model cannot be built from these arguments.
        TypeError: The model does not know one of `model_kwargs`.
    """

    predictions = TopClasses

    def __init__(
        self,
        model_name: str,
        num_classes: int,
        mixup: dict | None = None,
        label_smoothing: float = 0.0,
        data_preprocessor: dict | nn.Module | None = None,
        checkpoint: str | None = None,
        features: str | None = None,
        grad_checkpointing: bool = False,
        stream_loss: dict | None = None,
        moe: dict | None = None,
        extra_mlps: int = 0,
        **model_kwargs: Any,
    ) -> None:
        super().__init__(
            data_preprocessor=data_preprocessor
            or dict(type='BaseDataPreprocessor', non_blocking=True)
        )
        self.num_classes = num_classes
        check_type('label_smoothing', float, label_smoothing)
        check(0 <= label_smoothing < 1, 'label_smoothing', label_smoothing, 'from 0 to below 1')
        arguments = {'num_classes': num_classes, **model_kwargs}
        self.model = create_to_start(model_name, moe, extra_mlps, **arguments)
        self.model.set_grad_checkpointing(grad_checkpointing)
        self.stream_loss = stream_loss or {'weight': 0.0, 'blocks': []}
        if stream_loss is not None:
            _check_stream_loss(self.model, stream_loss, grad_checkpointing)
        self._arguments = {'model_name': model_name, **arguments}
        fits = checkpoint is None or isinstance(self.model, Convertible)
        check(fits, 'checkpoint', checkpoint, 'None beside what takes no experts')
        self.checkpoint, self.features, self.mixup = checkpoint, features, None
        self.criterion: nn.Module = nn.CrossEntropyLoss()
        if mixup is not None:
            self.mixup = Mixup(num_classes=num_classes, label_smoothing=label_smoothing, **mixup)
            self.criterion = SoftTargetCrossEntropy()
        elif label_smoothing:
            self.criterion = LabelSmoothingCrossEntropy(label_smoothing)

    def init_weights(self) -> None:
        """Starts a new training: as every row does at this seed, or from weights."""
        weights = start_model(self.model, self._arguments, self.checkpoint, self.features)
        if weights is not None:
            self.normalize_as(weights)

    @property
    def routed_model(self) -> nn.Module:
        """The timm model."""
        return self.model

    def normalize_inputs(self, datasets: Mapping) -> None:
        """As `MoeTrainingMixin`: the transforms of the data sets normalise their images."""
        owner = 'the weights'
        for field, dataset in datasets.items():
            if not isinstance(dataset, ImageClassification):
                print_log(f'{field}: its class normalises images as it likes', 'current')
                continue
            if (known := self.known_normalization) is not None:
                dataset.normalize_as(known, f'{field}.transform', owner)
            fed = normalization_of(dataset.transform)
            told = known is None or (field.startswith('train') and fed and fed.differing(known))
            if fed is not None and told:
                self.normalize_as(fed)  # what a training was fed with, its checkpoints say
                owner = f'{field}.transform'

    def check_batches(self, loader: DataLoader) -> None:
        """As `MoeTrainingMixin`: mixup wants pairs of images."""
        if self.mixup is not None and (size := loader.batch_size) is not None:
            check(size % 2 == 0, 'train_dataloader.batch_size', size, 'even beside model.mixup')
            whole = loader.drop_last or isinstance(loader.sampler, InfiniteSampler)
            check(whole, 'train_dataloader.drop_last', loader.drop_last, 'True beside model.mixup')

    def test_preprocessing(self, dataset: ConfigDict) -> dict:
        """As `MoeTrainingMixin`: what the transform of the data set does."""
        return preprocessing_of(dataset.get('transform') or {}, _TRANSFORM)

    def exportable(self, size: tuple[int, int] | None = None) -> Exportable:
        """As `MoeTrainingMixin`: the timm model."""
        check(size is None, 'size', size, 'left out: images have the size of the model')
        found = Exportable.of(self.model)
        # classes of the name are of its own weights; timm's default mean is nobody's decision
        others = {'classes', *([] if self.known_normalization else ['mean', 'std'])}
        return replace(found, about={k: v for k, v in found.about.items() if k not in others})

    def source(self, dataset: Any, folder: str | None = None) -> Source:
        """Images of a data set of tests or of its config, or of a folder without labels."""
        built: Any = dataset
        transform: Any = getattr(dataset, 'transform', None)
        if isinstance(dataset, ConfigDict):
            transform = normalized_as(dataset.transform, self.known_normalization, _TRANSFORM)
        found: Any = normalization_of(transform)
        check(found is not None, _TRANSFORM, transform, 'one that ends in a Normalize')
        if folder is not None:
            return Source(
                image_files(folder), lambda f: Sample(transform(load_image(str(f))), None), found
            )
        if isinstance(dataset, ConfigDict):
            built = DATASETS.build(dataset)
            built.transform = transform
        classes = list(built.metainfo['classes'])
        return Source(built, lambda x: Sample(x[0], torch.tensor(x[1])), found, classes)

    def forward(self, inputs: torch.Tensor, targets: Any = None, mode: str = 'tensor') -> Any:
        """Logits (B, C) of normalised (B, 3, H, W); in mode 'loss' losses, with targets (B,)."""
        check(mode in ('tensor', 'predict', 'loss'), 'mode', mode, "'tensor', 'predict' or 'loss'")
        if mode == 'loss':
            return self.loss(inputs, targets)
        with self.collect() if mode == 'predict' else nullcontext():
            return self.model(inputs)

    def loss(self, inputs: torch.Tensor, targets: torch.Tensor) -> dict[str, torch.Tensor]:
        """Auxiliary losses, the task's, that of the stream, and the accuracy, only logged."""
        if self.mixup is not None:
            inputs, targets = self.mixup(inputs, targets)
        stream: list[torch.Tensor] = []  # of inputs (B, N, D), which may be bfloat16
        with self.collect() as collected, ExitStack() as watched:
            for block in self.stream_loss['blocks']:
                keep = self.model.blocks[block].norm2.register_forward_pre_hook(
                    lambda _, x: stream.append(x[0].float().square().mean())
                )
                watched.enter_context(keep)
            logits = self.model(inputs)
            # which may be bfloat16: the loss is not
            losses = {'cross_entropy': self.criterion(logits.float(), targets)}
            if stream:
                losses['stream'] = self.stream_loss['weight'] * torch.stack(stream).sum()
            collected.add(losses, len(inputs))
            entries = loss_entries(collected)
        if self.mixup is None:  # a mixed image has no single right answer
            entries['top1'] = (logits.argmax(1) == targets).float().mean() * 100
        return entries


def _check_stream_loss(model: Any, options: dict, checkpointing: bool) -> None:
    field = 'model.stream_loss'
    allowed = 'left out, model.grad_checkpointing loses the gradients of such a loss'
    check(not checkpointing, field, options, allowed)
    whole = isinstance(options, dict) and options.keys() == {'weight', 'blocks'}
    check(whole, field, options, 'it takes weight and blocks, both')
    weight, blocks = options['weight'], options['blocks']
    check_type(f'{field}.weight', float, weight)
    check(0 < weight < math.inf, f'{field}.weight', weight, 'above 0 and finite')
    # other blocks have no such norm, or have it behind the MLP
    known = isinstance(model, Transformer) and all(
        isinstance(block, Block | EvaBlock) for block in model.blocks
    )
    check(known, field, options, 'left out, the blocks have no norm before the MLP')
    possible = [*range(len(model.blocks))]
    listed = isinstance(blocks, list) and {type(i) for i in blocks} == {int}
    fits = listed and sorted(blocks) == [i for i in possible if i in blocks]
    check(fits, f'{field}.blocks', blocks, f'a list of some of {possible}')
