import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import vqmoe_vision  # noqa: F401  registers the models
from vqmoe_vision.analysis import mean_statistics, patch_experts, token_experts
from vqmoe_vision.moe.experts import Experts
from vqmoe_vision.moe.layer import RoutedMlp
from vqmoe_vision.moe.routing import Router, Routing


class BrightnessRouter(Router):
    """Sends a token of value v to expert v first, to expert v + 1 second."""

    def forward(self, x: Tensor) -> Routing:
        first = x[:, 0].long()
        indices = torch.stack([first, (first + 1) % 4], dim=1)
        return Routing(indices, torch.full(indices.shape, 0.5))


class Pixels(nn.Module):
    """A model whose tokens are the pixels of an image."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = RoutedMlp(BrightnessRouter(), Experts(4, in_features=1, hidden_features=2))
        self.modes: list[bool] = []

    def forward(self, images: Tensor) -> Tensor:
        self.modes.append(self.training)
        return self.mlp(images.flatten(1).unsqueeze(-1))


def image(*rows: list[float]) -> Tensor:
    return torch.tensor([[rows]])


def test_every_image_counts_the_same_whatever_its_batch() -> None:
    # Pixels 0 0 0 1: experts 0, 1 three times and 1, 2 once: (3, 4, 1, 0) / 8. Pixels 2 2 2 2:
    # (0, 0, 4, 4) / 8. Two images of the first kind and one of the second:
    # (6, 8, 6, 4) / 24. A mean over batches instead of images would give (3, 4, 5, 4) / 16.
    first, second = image([0.0, 0.0], [0.0, 1.0]), image([2.0, 2.0], [2.0, 2.0])
    usage = mean_statistics(Pixels(), [torch.cat([first, first]), second])
    expected = torch.tensor([6.0, 8.0, 6.0, 4.0]) / 24
    torch.testing.assert_close(usage['mlp/load'], expected)


def test_model_is_asked_in_eval_mode_and_left_as_it_was() -> None:
    model = Pixels().train()
    model.mlp.eval()
    mean_statistics(model, [image([0.0, 1.0])])
    token_experts(model, image([0.0, 1.0]))
    assert model.modes == [False, False]
    assert model.training and not model.mlp.training


def test_both_branches_of_vqmoe_are_asked_and_agree_with_what_the_layer_reports() -> None:
    size = dict(img_size=8, patch_size=2, depth=2, embed_dim=8, num_heads=1)
    model = timm.create_model('vit_tiny_vqmoe', num_experts=3, num_codes=6, **size)
    images = torch.randn(4, 3, 8, 8)
    experts = token_experts(model, images)
    reported = mean_statistics(model, [images])
    branches = [experts[f'blocks.1.mlp.{name}'] for name in ('router', 'quantizer.codebook')]
    # 4 x 4 patches and the class token
    assert all(chosen.shape == (4, 17, 1) for chosen in branches)
    both = torch.cat(branches)
    share = both.flatten().bincount(minlength=3) / both.numel()
    torch.testing.assert_close(share, reported['blocks.1.mlp/load'])


def test_patch_experts_leaves_prefix_tokens_out_and_keeps_the_grid() -> None:
    # Every patch of the image is constant, and the patch embedding passes its value on untouched:
    # the router sees it, expert = value, rounded down. The class token is 0, expert 0.
    model = VisionTransformer(
        img_size=(4, 6), patch_size=2, embed_dim=2, depth=1, num_heads=1, num_classes=0
    )
    nn.init.zeros_(model.pos_embed)
    nn.init.zeros_(model.cls_token)
    nn.init.zeros_(model.patch_embed.proj.bias)
    nn.init.constant_(model.patch_embed.proj.weight, 1 / 12)  # mean over 3 x 2 x 2
    mlp = RoutedMlp(BrightnessRouter(), Experts(4, in_features=2, hidden_features=2))
    model.blocks = nn.Sequential(mlp)
    values = torch.tensor([[1.0, 2.0, 3.0], [3.0, 0.0, 2.0]]) + 0.5  # .5: no rounding downwards
    images = values.repeat_interleave(2, 0).repeat_interleave(2, 1).expand(2, 3, 4, 6)
    experts = patch_experts(model, images)['blocks.0.router']
    assert experts.tolist() == [[[1, 2, 3], [3, 0, 2]]] * 2
