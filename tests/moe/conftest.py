"""Tiny layers and models of every method, and what the tests look at in them.

D = 8 tokens wide, E = 4 experts, H = 16 hidden. StableMoE's raw patch is here the token itself,
twice (8 + 8 = the 4 x 4 cells of one channel), and the image that a frozen network looks at is the
mean of its tokens, so that all methods are functions of x alone.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from vqmoe_vision.moe import METHODS, MoeLayer
from vqmoe_vision.moe import layer as layer_module
from vqmoe_vision.moe.codebooks.ema import EmaCodebook
from vqmoe_vision.moe.experts import Experts
from vqmoe_vision.moe.layer import UNCOLLECTED
from vqmoe_vision.moe.raw_patches import Host, ImageReader, RawPatches

from ..variants import presets, trials

D, E, H = 8, 4, 16
# every preset and trial of every method: its name, the options, and an id
CASES = [
    pytest.param(name, options, id=f'{name}-{label}')
    for name, method in METHODS.items()
    for options_of in (presets(method.config), trials(method.config))
    for label, options in options_of.items()
]


class Pixels(nn.Sequential):
    """A network for square images, whose features are their pixels, or what parts make of them."""

    def __init__(self, side: int, width: int, *parts: nn.Module) -> None:
        super().__init__(nn.Flatten(), *parts)
        self.image_size = self.sizes = (side, side)
        self.num_features, self.num_prefix_tokens, self.grid_size = width, 0, (1, 1)

    def forward_features(self, x: Tensor) -> Tensor:
        """The image is a patch."""
        return self(x)[:, None]


class Patched(nn.Module):
    """Base: reads raw patches or images for the layers before anything else runs."""

    def __init__(self) -> None:
        super().__init__()
        self.raw_patches = RawPatches()
        self.reader: ImageReader | None = None

    def read(self, x: Tensor) -> None:
        if self.reader is not None:
            image = x.detach().mean(dim=1)[..., None, None]
            self.raw_patches.value = self.reader(image, (x.shape[1], 1))
        else:
            self.raw_patches.value = torch.cat([x, x], dim=-1).detach()

    def make_layer(self, method: str, num_experts: int, **options) -> MoeLayer:
        entry = METHODS[method]
        config = entry.config.from_options(num_experts=num_experts, **options)
        if entry.needs_features and self.reader is None:
            self.reader = entry.reader(config, lambda: Pixels(1, D))
        experts = Experts(num_experts, D, H)
        # of ViT size the experts' answers would drown in rounding errors at this width
        for linear in (experts.fc1, experts.fc2):
            nn.init.normal_(linear.weight, std=0.3)
            nn.init.normal_(linear.bias, std=0.3)
        host = Host(2 * num_experts, in_chans=1, raw_patches=self.raw_patches)
        layer = entry.build(D, config, experts, host)
        spread(layer)
        return layer


class OneLayer(Patched):
    def __init__(self, method: str, num_experts: int = E, **options) -> None:
        super().__init__()
        self.layer = self.make_layer(method, num_experts, **options)

    def forward(self, x: Tensor) -> Tensor:
        self.read(x)
        return self.layer(x)


class Block(nn.Module):
    """Residual block with LayerScale: its multiplication saves the layer's answer for backward."""

    def __init__(self, layer: MoeLayer) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(D)
        self.mlp = layer
        self.gamma = nn.Parameter(torch.full((D,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gamma * self.mlp(self.norm(x))


class Model(Patched):
    """Two MoE blocks; (B, N, D) -> (B, D)."""

    def __init__(self, method: str, num_experts: int = E, **options) -> None:
        super().__init__()
        self.stem = nn.Linear(D, D)
        layers = (self.make_layer(method, num_experts, **options) for _ in range(2))
        self.blocks = nn.ModuleList(Block(layer) for layer in layers)

    def forward(self, x: Tensor) -> Tensor:
        self.read(x)
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return x.mean(dim=1)


@torch.no_grad()
def spread(layer: MoeLayer) -> None:
    """Draw routers and gates of size one: at their real start all experts are nearly equal."""
    for name, parameter in layer.named_parameters():
        if not name.startswith('experts.') and parameter.ndim == 2:
            nn.init.normal_(parameter, std=0.5)
    for module in layer.modules():
        if isinstance(module, EmaCodebook):
            module._put(torch.tensor(True), torch.randn(module.num_codes, module.dim))
            module.started.fill_(True)


@pytest.fixture(scope='session')
def make_layer() -> Callable[..., OneLayer]:
    """Build one layer: make_layer('smoe', top_k=1); its `MoeLayer` is `.layer`."""
    return OneLayer


@pytest.fixture(scope='session')
def make_model() -> Callable[..., Model]:
    return Model


@pytest.fixture
def choices() -> Callable[[nn.Module, Tensor], list[Tensor]]:
    """All experts, codes or tokens that any router or codebook of a module chooses for x."""

    def choose(module: nn.Module, x: Tensor) -> list[Tensor]:
        seen: list[Tensor] = []

        def keep(_module: nn.Module, _args: tuple, output: object) -> None:
            tokens = getattr(output, 'tokens', None)
            indices = getattr(output, 'indices', None) if tokens is None else tokens
            if isinstance(indices, Tensor):
                seen.append(indices)

        hooks = [part.register_forward_hook(keep) for part in module.modules()]
        module(x)
        for hook in hooks:
            hook.remove()
        return seen

    return choose


@pytest.fixture
def snapshot() -> Callable[[nn.Module], dict[str, Tensor]]:
    return lambda module: {name: value.clone() for name, value in module.state_dict().items()}


@pytest.fixture(autouse=True)
def _warned(monkeypatch) -> None:
    """Most tests train single layers without a collector, knowingly."""
    monkeypatch.setattr(layer_module, '_said', {UNCOLLECTED})
