"""TGR-MoE: the teacher's probabilities and the loss by hand, and what the teacher leaves alone."""

import math
from typing import Any

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

from vqmoe_vision import collect_losses
from vqmoe_vision.contrib.mocle import fit_reader
from vqmoe_vision.contrib.tgrmoe import Teacher, TeacherConfig, TeacherRouter
from vqmoe_vision.models import complexity
from vqmoe_vision.moe.raw_patches import Host, RawPatches, image_reader

from .. import cases
from ..models.conftest import DENSE, TINY, make

B, N, D, E = 2, 3, 4, 3


class Columns(nn.Module):
    """A teacher of images (B, D, 1, N), of which each column is a patch."""

    num_features, num_prefix_tokens = D, 0
    image_size = sizes = grid_size = (1, N)

    def forward_features(self, images):
        return images.flatten(2).mT


def router_of(**options: Any) -> tuple[TeacherRouter, Teacher]:
    options = {'importance_weight': 0.0, 'load_weight': 0.0, 'router_noise': 0.0, **options}
    config = TeacherConfig.from_options(num_experts=E, **options)
    teacher = Teacher(config, Columns()).train()
    router = TeacherRouter(D, config, Host(N, raw_patches=RawPatches(teacher)))
    nn.init.normal_(router.weight)
    return router, teacher


def told(teacher: Teacher, token: torch.Tensor) -> torch.Tensor:
    """What the teacher says of one token, (E,)."""
    mean = teacher.centroids.mean(dim=0)
    cosines = [F.cosine_similarity(token - mean, c - mean, dim=0) for c in teacher.centroids]
    powers = torch.stack(cosines).div(teacher.temperature).exp()
    return powers / powers.sum()


@torch.no_grad()
def test_known_answer():
    # Centroids (1, 0), (-1, 0) and (0, 0) have the mean 0. A token (3, 0) has the cosines 1, -1 and
    # 0: at tau = 1 / log 2 the powers are 2, 1/2 and 1, of 7/2: 4/7, 1/7 and 2/7. A student who
    # knows nothing says 1/3 of each: log 3 - entropy = 1.098612 - 0.955700 = 0.142912 nats.
    router, teacher = router_of(teacher_temperature=1 / math.log(2), teacher_weight=0.5)
    teacher.centroids.zero_()[:2, 0] = torch.tensor([1.0, -1.0])
    images = torch.zeros(B, D, 1, N)
    images[:, 0] = 3
    found = teacher(images, (1, N))
    torch.testing.assert_close(found.exp(), torch.tensor([4, 1, 2]).div(7).expand(B, N, E))
    router.raw_patches.show(images, (1, N))
    router.weight.zero_()
    loss = router(torch.randn(B, N, D)).losses
    assert loss.keys() == {'teacher'}
    assert loss['teacher'].item() == pytest.approx(0.5 * 0.142912, abs=1e-6)


@cases('options', {}, {'score': 'sigmoid'}, {'num_shared_experts': 1, 'top_k': 1})
def test_the_loss_and_every_gradient(options):
    router, teacher = router_of(**options)
    images, x = torch.randn(B, D, 1, N), torch.randn(B, N, D, requires_grad=True)
    router.raw_patches.show(images, (1, N))
    router(x).losses['teacher'].backward()
    found = router.weight.grad, x.grad
    router.weight.grad = x.grad = None
    loss = torch.zeros(())
    for image, tokens in zip(images, x, strict=True):
        for t, token in enumerate(tokens):
            logits, target = router.weight @ token, told(teacher, image[:, 0, t])
            gates = logits.sigmoid() if options.get('score') else logits.exp()
            loss = loss + (target * (target / (gates / gates.sum())).log()).sum() / (B * N)
    loss.backward()
    torch.testing.assert_close(found, (router.weight.grad, x.grad), rtol=1e-4, atol=1e-6)


def test_a_teacher_runs_in_training_alone_and_its_tokens_are_those_of_the_student(images):
    model, plain = (make(name, reg_tokens=2) for name in ('tgrmoe', 'smoe'))
    calls, reader = [], image_reader(model)
    reader.network.blocks[0].register_forward_hook(lambda *_: calls.append(1))
    counts = fit_reader(model, [images])
    assert len(counts) == 8 and counts.sum() == 7 * len(images)  # of 19 tokens each third
    assert complexity(model) == complexity(plain)
    calls.clear()
    model.eval()(images)
    assert calls == []
    with collect_losses(model.train()) as collected:
        (model(images).sum() + collected.total()).backward()
    assert calls == [1] and {name.rpartition('/')[2] for name in collected.losses} >= {'teacher'}
    assert reader(images, (4, 4)).shape == (len(images), 3 + 16, 8)
    assert all(value.grad is None for value in reader.network.buffers())


@torch.no_grad()
def test_a_teacher_of_another_grid_is_resized(images):
    """Of a grid of 1 x 2, columns at the edges of 2 x 4 are the halves themselves."""
    teacher = router_of()[1]
    teacher.network.grid_size = (1, 2)
    halves = torch.randn(B, 2, D)
    teacher.network.forward_features = lambda _: halves
    found = teacher(torch.zeros(B, D, 1, N), (2, 4)).unflatten(1, (2, 4))
    own = teacher(torch.zeros(B, D, 1, N), (1, 2))
    torch.testing.assert_close(found[:, :, 0], own[:, :1].expand(-1, 2, -1))
    torch.testing.assert_close(found[:, :, 3], own[:, 1:].expand(-1, 2, -1))


@torch.no_grad()
@pytest.mark.parametrize('pooling', ['avg', 'token'])
def test_features_are_tokens_after_the_last_norm(pooling, images):

    model: Any = make('tgrmoe', class_token=True, global_pool=pooling)
    network = image_reader(model).network
    dense = timm.create_model(DENSE, **TINY, global_pool=pooling).eval()
    dense.load_state_dict(network.state_dict(), strict=False)
    norm = dense.fc_norm if pooling == 'avg' else nn.Identity()
    found, tokens = image_reader(model).features(images), norm(dense.forward_features(images))
    torch.testing.assert_close(found, tokens[:, ::3].flatten(0, 1))  # of 17
    torch.testing.assert_close(found.std(dim=-1), torch.ones(len(found)), rtol=0.1, atol=0)
