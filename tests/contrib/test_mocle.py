"""MoCLE against a plain reading of its equations, and what holds of clusters in any training."""

import pytest
import torch
from torch import nn

from vqmoe_vision.contrib.mocle import ClusterRouter, Clusters, MoCLEConfig
from vqmoe_vision.moe.raw_patches import Host, RawPatches

from ..moe.by_hand import assert_by_hand, expert
from ..moe.conftest import OneLayer as make_layer
from ..moe.conftest import Pixels

D, E = 8, 4


def naive(net, x):
    """Images (B, N, D), one token after the other."""
    out, router, experts = torch.zeros_like(x), net.layer.router, net.layer.experts

    for b, image in enumerate(x):
        distances = (net.reader.centroids - image.detach().mean(dim=0)).norm(dim=1)
        embedding = router.cluster_embed[distances.argmin()]
        scores = (router.weight @ embedding + router.bias) / router.config.temperature
        gates = scores.exp() / scores.exp().sum()
        e = int(gates.argmax())
        for t, token in enumerate(image):
            own, universal = expert(experts, e, token), expert(experts, E - 1, token)
            out[b, t] = gates[e] * own + (1 - gates[e]) * universal
    return out


@pytest.mark.parametrize('num_tokens', [1, 6])
def test_output_and_every_gradient(num_tokens):
    # at 0.05 the gates of the tests' spread routers are 0 and 1
    net = make_layer('mocle', router_noise=0.0, temperature=1.0, num_clusters=5)
    assert_by_hand(net, lambda x: naive(net, x), torch.randn(6, num_tokens, D))


def router_of(clusters, **options):
    """A router of images of these clusters, with logits so near that noise decides."""
    patches = RawPatches()
    patches.value = torch.tensor(clusters)
    config = MoCLEConfig(num_experts=3, num_clusters=2, **options)
    router = ClusterRouter(2, config, Host(1, raw_patches=patches))
    with torch.no_grad():
        router.cluster_embed.mul_(0.02)
        router.bias.zero_()
    return router


def test_known_answer():
    # Embeddings (1, 0) and (0, 1); logits of cluster 0: (0.05, 0), of cluster 1: (0, 0.1). Over
    # tau = 0.05 these are (1, 0) and (0, 2): sigmoid(1) = 0.731059 and sigmoid(2) = 0.880797.
    router = router_of([0, 1, 0]).eval()
    with torch.no_grad():
        router.cluster_embed.copy_(torch.eye(2))
        router.weight.copy_(torch.tensor([[0.05, 0.0], [0.0, 0.1]]))
    routing = router(torch.randn(3, 2, 2))
    assert routing.indices.tolist() == [[0, 2]] * 2 + [[1, 2]] * 2 + [[0, 2]] * 2
    first, second = [0.731059, 0.268941], [0.880797, 0.119203]
    expected = torch.tensor([first, first, second, second, first, first])
    torch.testing.assert_close(routing.weights, expected, rtol=0, atol=1e-6)
    assert routing.losses == {}
    assert routing.stats['gate'].item() == pytest.approx((2 * 0.731059 + 0.880797) / 3)
    assert routing.stats['cluster_usage'].tolist() == pytest.approx([2 / 3, 1 / 3])


def test_noise_is_a_tenth_in_the_logits_and_drawn_from_torchs_generator():
    # Two experts of equal logits: the gate is sigmoid(|a - b| / tau) of two draws; the difference
    # has a standard deviation of 0.1 * sqrt(2).
    router = router_of([0] * 20000, temperature=1.0)
    with torch.no_grad():
        router.weight.zero_()
    gates = []
    for _ in range(2):
        torch.manual_seed(3)
        gates.append(router(torch.zeros(20000, 1, 2)).weights[:, 0])
    assert torch.equal(gates[0], gates[1])
    spread = gates[0].logit().square().mean().sqrt().item()
    # of 20,000 draws the estimate is within 0.5 % one time in two: 3 % never fails by chance
    assert spread == pytest.approx(0.1 * 2**0.5, rel=0.03)


def clusters_of(num_clusters, width=2):
    config = MoCLEConfig(num_clusters=num_clusters)
    return Clusters(config, Pixels(1, width))


BLOBS = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]])


def test_blobs_become_clusters_and_an_unknown_image_has_the_nearest():
    features = BLOBS.repeat_interleave(20, dim=0) + 0.1 * torch.randn(60, 2)
    reader, again = clusters_of(3), clusters_of(3)
    assert not reader.fitted
    state = torch.get_rng_state()
    counts = reader.fit(features)
    assert torch.equal(torch.get_rng_state(), state), 'k-means has draws of its own'
    assert counts.tolist() == [20] * 3
    found = reader(features[..., None, None], (1, 1)).view(3, 20)
    assert torch.equal(found, found[:, :1].expand_as(found)) and len(found.unique()) == 3
    unknown = torch.tensor([[4.0, 1.0], [6.0, 1.0], [-3.0, 30.0]])[..., None, None]
    assert reader(unknown, (1, 1)).tolist() == found[:, 0].tolist()
    again.fit(features)
    assert torch.equal(again.centroids, reader.centroids)
    assert reader.fitted


def test_a_network_is_frozen_whatever_the_model_does():
    network = Pixels(2, 4, nn.Linear(12, 4), nn.Dropout(0.5))
    reader = Clusters(MoCLEConfig(num_clusters=2), network).train()
    assert reader.training and not any(part.training for part in network.modules())
    assert list(reader.parameters()) == []
    assert set(network.state_dict()) == {'1.weight', '1.bias'}
    images = torch.randn(3, 3, 2, 2, requires_grad=True)
    features = reader.features(images)
    assert not features.requires_grad and torch.equal(features, reader.features(images))
    with torch.autocast('cpu', torch.bfloat16):
        assert torch.equal(features, reader.features(images))
