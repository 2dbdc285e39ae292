"""MoCLE: the cluster of an image decides for all of its tokens, beside an expert for everything.

"Mixture of Cluster-conditional LoRA Experts" (Gou et al., arXiv 2312.12379): samples are clustered
once, before training, by k-means on features of a frozen network. For a sample of cluster k, and
any token x of it:

    logits = W C[k] + b + eps,  eps ~ N(0, 0.1^2) while training      C: a learned embedding
    G = softmax(logits / tau),  e = argmax G,  tau = 0.05
    y = G_e expert_e(x) + (1 - G_e) universal(x)

Both weights sum to 1, and there is no balance loss.

Where we differ: experts are whole MLPs, one of them universal; the paper's are LoRAs (rank 8)
beside a frozen linear layer of a language model. The paper clusters instructions by sentence
embeddings, we images by features of a dense vision transformer of this model's shape and training
set: means of the patches after its last norm. The paper's embedding is as wide as its features,
ours as the tokens; every layer has its own, which starts as in their code. That multiplies each
expert by its weight twice, the paper and we once. Noise is drawn per image.

The frozen network runs once per image, before the first block and for all layers. Network and
centroids are buffers of one module in the stem: a checkpoint has all that routes, and clusters
cannot move while anything learns. The network keeps the size of images that clusters were fitted
at, whatever the model's is now. docs/explanation/methods.md says how clusters come about.

Legend: B images, N tokens per image, T = B * N, D width, E experts with the universal one, K
clusters, F features of an image, S images of a training set.
"""

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from ..models.compat import Network, StateDict, below, misfit, part_of, without
from ..models.fitting import Report, Size, transfer
from ..models.normalization import Normalization
from ..models.weights import network_of
from ..moe.codebooks import nearest_code
from ..moe.codebooks.usage import kmeans
from ..moe.config import MoeConfig, check, option
from ..moe.layer import warn_once
from ..moe.losses import token_mean
from ..moe.methods import Method
from ..moe.raw_patches import NETWORK, READER, Host, ImageReader, RawPatches, image_reader
from ..moe.routing import Router, Routing, expert_load, full_precision


class FeatureViT(VisionTransformer):
    """timm's `VisionTransformer` without a head, whose answer is the average over the patches."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Features of images, (B, D)."""
        tokens = super().forward_features(x, *args, **kwargs)
        return self.fc_norm(tokens[:, self.num_prefix_tokens :].mean(dim=1))

    def forward_features(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Tokens after the last norm, which timm leaves to a head that averages: (B, N, D)."""
        return self.fc_norm(super().forward_features(x, *args, **kwargs))

    def no_weight_decay(self) -> set[str]:
        """Nothing: it has buffers alone."""
        return set()

    @property
    def sizes(self: Any) -> tuple[int, ...]:
        """Height and width of its images and of its patches, in pixels."""
        return (*self.patch_embed.img_size, *self.patch_embed.patch_size)

    @property
    def grid_size(self: Any) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self.patch_embed.dynamic_feat_size(self.sizes[:2])

    @property
    def image_size(self: Any) -> tuple[int, int]:
        """Height and width of its images, in whole patches where the model pads them."""
        if not self.patch_embed.dynamic_img_pad:
            return self.sizes[:2]
        return self.grid_size[0] * self.sizes[2], self.grid_size[1] * self.sizes[3]


@torch.no_grad()
def resized(network: Any, sizes: tuple[int, ...]) -> Any:
    """The network for images and patches of these sizes."""
    if sizes != network.sizes:
        network.set_input_size(sizes[:2], sizes[2:])
    return frozen(network)


def frozen(network: Any) -> Any:
    """The network with buffers in the place of parameters."""
    # a parameter that never gets a gradient is decayed, and data-parallel training waits for it
    for module in network.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                del module._parameters[name]
                module.register_buffer(name, parameter.detach())
    return network


__all__ = ['fit_reader', 'load_features']

# What a data set is prepared by: of classification, and of mmseg.
_PREPARATIONS = ('transform', 'pipeline')
_NO_CHOICE = {'num_experts': 2}  # where options have no effect


@dataclass(frozen=True, kw_only=True)
class MoCLEConfig(MoeConfig):
    """Options of MoCLE, whose last expert is the universal one; with two experts nothing is chosen.

    Args:
        num_clusters: K, clusters of images, at least 1.
        temperature: tau, above 0.
        router_noise: Standard deviation of the noise in the logits, training only, at least 0.
    """

    # both weights of a token sum to 1
    EXACT_UPCYCLING: ClassVar[dict[str, dict]] = {'any': {}}

    num_clusters: int = option(64, 8, bounds='[1, inf)', of_weights=False, idle=_NO_CHOICE)
    temperature: float = option(0.05, 1.0, bounds='(0, inf)', idle=_NO_CHOICE)
    router_noise: float = option(0.1, 0.0, bounds='[0, inf)', of_weights=False, idle=_NO_CHOICE)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require('num_experts', self.num_experts >= 2, 'at least 2, one is universal')


class Clusters(ImageReader):
    """Tells the cluster of an image: the nearest centroid of its features."""

    centroids: Tensor  # (K, F), random until `fit`
    fitted: Tensor  # () bool, for these weights
    sizes: Tensor  # of the network, int64
    clustered = 'images'  # what the features are of
    lacks_weights = False  # whether a training begins without any for the network
    _fit_due = True  # what `fitted` says, as far as the host knows

    def __init__(self, config: MoCLEConfig, network: nn.Module, **factory: Any) -> None:
        super().__init__()
        if isinstance(network, VisionTransformer):  # a dense one of timm gives its features
            network.__class__ = FeatureViT
            network.reset_classifier(0)
            network.set_grad_checkpointing(False)
            network.attn_pool = None  # type: ignore[assignment]  # as timm where there is none
        self.network = frozen(network).eval()
        device, shape = factory.get('device'), (config.num_clusters, self.network.num_features)
        self.register_buffer('fitted', torch.empty((), dtype=torch.bool, device=device))
        self.register_buffer('sizes', torch.tensor(self.network.sizes, device=device))
        self.register_buffer('centroids', torch.empty(shape, **factory))
        self.init_weights()

    def init_weights(self) -> None:
        """Random centroids of the length of normalised features."""
        nn.init.normal_(self.centroids)
        self.void()

    @torch.no_grad()
    def void(self) -> None:
        """Forget that it was fitted: it was to other features."""
        self.fitted.fill_(False)
        self.sizes.copy_(torch.tensor(self.network.sizes))
        self._fit_due = True

    def train(self, mode: bool = True) -> Any:
        """As torch's, but for the network, which stays in eval mode."""
        super().train(mode)
        self.network.eval()
        return self

    def features(self, images: Tensor) -> Tensor:
        """Features (B, F) float32 of normalised images, resized as a whole; without graph."""
        return self._read(images, self.network)

    @torch.no_grad()
    def _read(self, images: Tensor, network: Any) -> Tensor:
        size = self.network.image_size
        with full_precision(images):
            if images.shape[-2:] != size:
                images = F.interpolate(images.float(), size, mode='bilinear', antialias=True)
            found = network(images.to(next(self.network.buffers(), images).dtype))
        return found.float()

    def forward(self, images: Tensor, grid_size: tuple[int, int]) -> Tensor:
        """Cluster of each image, (B,) int64."""
        self._warn_once()
        features = self.features(images)
        with full_precision(features):
            return nearest_code(features, self.centroids.float())

    def _warn_once(self) -> None:
        if self.training and self._fit_due and torch.is_grad_enabled():
            warn_once(
                'training a model that reads images by a frozen network, and was not fitted to the '
                'training set: what it decides by is random; call load_features(model, ...), '
                'unless the model starts from a dense one, and then fit_reader(model, batches) of '
                'vqmoe_vision.contrib.mocle'
            )

    @torch.no_grad()
    def fit(self, features: Tensor) -> Tensor:
        """K-means of features (S, F) with a fixed seed; gives how many each cluster has, (K,)."""
        number, images = len(self.centroids), len(features)
        allowed = f'at most {images}, as {self.clustered}'
        check(number <= images, 'num_clusters', number, allowed)
        check(bool(features.isfinite().all()), 'features', 'nan or infinite', 'finite numbers')
        self.centroids.copy_(kmeans(features, number))
        self.fitted.fill_(True)
        self._fit_due = False
        return nearest_code(features, self.centroids.float()).bincount(minlength=number)

    def expected(self, state_dict: Mapping[str, Tensor]) -> StateDict:
        """As `ImageReader`, with the network in the size of the state dict."""
        return self.state_dict() | self._network_for(state_dict).state_dict(prefix=NETWORK)

    def _network_for(self, state_dict: Mapping[str, Tensor]) -> Any:
        sizes, own = self._sizes_in(state_dict.get('sizes')), self.network
        return own if sizes == own.sizes else resized(copy.deepcopy(own), sizes)

    def _sizes_in(self, given: Tensor | None) -> tuple[int, ...]:
        """Sizes of the network as a state dict says them, whose numbers may have been rounded."""
        own = self.network.sizes
        # of fewer digits than the numbers have, as a cast leaves them
        if given is None or given.is_meta or given.equal(given.new_tensor(own)):
            return own
        numbers = [float(number) for number in given.tolist()]
        exact = given.element_size() > 2 and all(map(float.is_integer, numbers))
        check(exact, 'sizes', numbers, f'{own}, or others in whole numbers: {given.dtype}')
        return tuple(map(int, numbers))

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        given = state_dict.get(f'{prefix}sizes')
        if given is not None:
            sizes = self._sizes_in(given)
            resized(self.network, sizes)  # before its weights come
            state_dict[f'{prefix}sizes'] = torch.tensor(sizes, device=given.device)
        super()._load_from_state_dict(state_dict, prefix, *args)
        if not self.fitted.is_meta:
            self._fit_due = not bool(self.fitted)

    def adapted(
        self, own: StateDict, others: StateDict, path: str, image_sizes: Sequence[Size]
    ) -> tuple[StateDict, Report]:
        """As `ImageReader`: as a checkpoint has it, or with the weights of a dense one."""
        result = below(READER, without(own, NETWORK))
        expected = self.state_dict(prefix=READER)
        shared = {k: v for k, v in expected.items() if k in result}
        if problem := misfit(shared, {k: v for k, v in result.items() if k in shared}):
            raise ValueError(f'checkpoint {path!r} is of another size: {problem}')
        read = Report()
        if own or not any('.mlp.experts.' in name for name in others):
            weights, network = part_of(own, NETWORK) or others, self._network_for(own)
            # that of a checkpoint takes the sizes of the file
            fitted, read = transfer(network, weights, path, () if own else image_sizes, whole=True)
            result |= below(READER + NETWORK, fitted)
        resized = below(READER + NETWORK, read.resized)
        copied = {} if own else {READER + NETWORK + k: k for k in read.loaded}
        remarks = ('images are read by a frozen copy of it',) if copied else ()
        return result, Report.of(result, expected, resized, copied, remarks=remarks)

    def before_start(
        self, features: str | None, started: bool, weights: Normalization | None
    ) -> Normalization | None:
        """As `ImageReader`."""
        from mmengine.logging import print_log

        from ..engine.checkpoint import read_state
        from ..engine.model import in_words, read_normalization

        self.lacks_weights = features is None and not started
        if features is None:
            return weights
        state, network = read_state(features), network_of(features)
        for line in load_features(self, state, features, network=network).lines():
            print_log(f'{features}: features: {line}', logger='current')
        found = read_normalization(features)
        if weights is not None and found is not None and weights.differing(found):
            allowed = f'weights for images with {in_words(weights)}; its are for {in_words(found)}'
            check(False, 'features', features, allowed)
        return weights or found

    def before_training(self, runner: Any) -> None:
        """As `ImageReader`; clusters of a run that resumes are fitted, and stay."""
        from mmengine.dist import broadcast

        from ..analysis.source import images_of
        from ..engine.model import unwrapped

        if bool(self.fitted):
            return
        # not before: a run that resumes needs none, and whether it does is known only now
        allowed = (
            'the checkpoint of a dense model of the same shape, trained on the same training set, '
            'by whose features images are clustered; or start from one by checkpoint'
        )
        check(not self.lacks_weights, 'features', None, allowed)
        # as many images at most, drawn from the training set with a fixed seed
        source = unwrapped(runner).source(_unaugmented(runner.cfg)).drawn(16384)
        counts = fit_reader(self, map(images_of, source.batches(64)))
        # of the first process: others may round otherwise
        for buffer in self.buffers():
            broadcast(buffer)
        runner.logger.info(
            f'{len(counts)} clusters of {int(counts.sum())} {self.clustered}, the smallest of '
            f'{int(counts.min())} and the largest of {int(counts.max())}'
        )


def _unaugmented(config: Any) -> Any:
    """The training set, prepared as the images of validation or test."""
    dataset = config.train_dataloader.dataset
    found = [
        {**dataset, field: other[field]}
        for part in ('val', 'test')
        if (other := (config.get(f'{part}_dataloader') or {}).get('dataset'))
        for field in _PREPARATIONS
        if field in other and field in dataset
    ]
    allowed = (
        f'one with a {" or ".join(_PREPARATIONS)}, as val_dataloader.dataset has: images are '
        'clustered before training without augmentation'
    )
    check(bool(found), 'train_dataloader.dataset', dict(dataset), allowed)
    return type(dataset)(found[0])


def _clusters_of(model: nn.Module) -> Clusters:
    reader: Any = image_reader(model)
    check(reader is not None, 'model', type(model).__name__, 'a model that reads images')
    return reader


def load_features(
    model: nn.Module,
    state_dict: StateDict,
    path: str,
    image_sizes: Sequence[Size] = (),
    network: Network | None = None,
) -> Report:
    """Loads what a model reads images with; clusters of other features are void.

    Args:
        model: Any model with MoCLE layers; only what reads images is changed.
        state_dict: Of a dense model of the shape of that network.
        path: For messages.
        image_sizes: (H, W), of which one may be that of its positions.
        network: That the weights are of, if it is known.

    Raises:
        ValueError: The model reads no images, the state is none or of a model with experts, or it
            does not fit.
    """
    reader = _clusters_of(model)
    check(isinstance(state_dict, Mapping), 'state_dict', state_dict, 'tensors by their names')
    if any('.mlp.experts.' in name for name in state_dict):
        raise ValueError(f'checkpoint {path!r} has experts; images are read by a dense model')
    own = reader.network
    state, report = transfer(own, state_dict, path, image_sizes, network=network, whole=True)
    own.load_state_dict(state, strict=False)
    reader.void()
    return report


@torch.no_grad()
def fit_reader(model: nn.Module, batches: Iterable[Tensor]) -> Tensor:
    """Clusters the images of a training set; trainings by config do that themselves.

    The weights of the network come first.

    Args:
        model: Any model with MoCLE layers; only what reads images is changed.
        batches: Images (B, channels, height, width) without augmentation, normalised as for the
            dense model.

    Returns:
        Images of each cluster, (K,) int64.

    Raises:
        ValueError: Nothing in the model has to be fitted, there are too few images, or a batch is
            something else.
    """
    reader = _clusters_of(model)
    features = []
    for images in batches:
        of_images = isinstance(images, Tensor) and images.ndim == 4
        check(of_images, 'batches', images, 'images alone, (B, channels, height, width)')
        features.append(reader.features(images.to(reader.fitted.device)))
    check(bool(features), 'batches', batches, 'at least one')
    return reader.fit(torch.cat(features))


class ClusterRouter(Router):
    """Sends all tokens of an image to the expert of its cluster, and to the universal one."""

    per_image = True
    has_losses = False
    experts_per_token = 2  # the chosen and the universal one
    raw_patches: RawPatches

    def __init__(self, in_features: int, config: MoCLEConfig, host: Host, **factory: Any) -> None:
        super().__init__()
        self.config, self.raw_patches = config, host.raw_patches
        chosen = config.num_experts - 1
        self.cluster_embed = nn.Parameter(torch.empty(config.num_clusters, in_features, **factory))
        self.weight = nn.Parameter(torch.empty(chosen, in_features, **factory))
        self.bias = nn.Parameter(torch.empty(chosen, **factory))
        self.init_weights()

    def init_weights(self) -> None:
        """As `nn.Embedding` and `nn.Linear`, which their code has (gyhdog99/MoCLE 68282ec)."""
        nn.init.normal_(self.cluster_embed)
        bound = self.weight.shape[1] ** -0.5
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x: Tensor) -> Routing:
        """Route images (B, N, D) in float32."""
        clusters = self.raw_patches.current()
        self.raw_patches.check_number('images', x.shape[0], clusters.shape[0])
        num_tokens, config = x.shape[1], self.config
        with full_precision(x):
            embedded = self.cluster_embed.index_select(0, clusters).float()
            logits = self.among_on(F.linear(embedded, self.weight.float(), self.bias.float()))
            if self.training and config.router_noise > 0:
                logits = logits + torch.randn_like(logits) * config.router_noise
            probs = (logits / config.temperature).softmax(dim=-1)
            # by logit: small probabilities underflow to equals
            expert = logits.argmax(dim=-1, keepdim=True)
            gate = probs.gather(1, expert)
        universal = torch.full_like(expert, config.num_experts - 1)
        return Routing(
            torch.cat([expert, universal], dim=1).repeat_interleave(num_tokens, dim=0),
            torch.cat([gate, 1 - gate], dim=1).repeat_interleave(num_tokens, dim=0),
            stats={
                'gate': token_mean(gate.detach().squeeze(1)),
                'cluster_usage': expert_load(clusters, config.num_clusters),
            },
        )

    def no_weight_decay(self) -> set[str]:
        """The embeddings: decay would only flatten the gates."""
        return {'cluster_embed'}


METHOD = Method(MoCLEConfig, ClusterRouter, Clusters)
