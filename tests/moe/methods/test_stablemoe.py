"""StableMoE: two stages, what each gradient reaches, and that the second stage does not move."""

import pytest
import torch
import torch.nn.functional as F

from vqmoe_vision.moe import collect_losses, restart, start_training
from vqmoe_vision.moe.methods import stablemoe
from vqmoe_vision.moe.methods.stablemoe import DistilledRouter, StableMoEConfig, StableRouter
from vqmoe_vision.moe.raw_patches import Host

from ... import refused
from ..by_hand import assert_by_hand, expert, moved

D, E = 8, 4


def teacher_choice(net, x):
    """(1): argmax of E_i . h for all tokens."""
    return (x.flatten(0, 1) @ net.layer.router.expert_embed.t()).argmax(dim=1)


def student_choice(net, x):
    """(6): argmax of E^_i . D(X); the raw patch of the tests is the token twice."""
    distilled = net.layer.router.distilled
    features = torch.cat([x, x], dim=-1).flatten(0, 1) @ distilled.weight('project').t()
    return (features @ distilled.weight('expert_embed').t()).argmax(dim=1)


def train(net, steps):
    """AdamW with momentum and strong weight decay."""
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.05, weight_decay=0.5)
    for _ in range(steps):
        optimizer.zero_grad()
        with collect_losses(net) as collected:
            out = net(torch.randn(4, 6, D))
            ((out - 1).square().mean() + collected.total()).backward()
        optimizer.step()


@pytest.mark.parametrize('frozen', [False, True])
@pytest.mark.parametrize('training', [False, True])
def test_output_and_every_gradient(make_layer, frozen, training):
    net, x = make_layer('stablemoe').train(training), torch.randn(4, 6, D)
    if frozen:
        net.layer.router.distilled.freeze(torch.tensor(True))
    teacher, student = teacher_choice(net, x), student_choice(net, x)
    assert not torch.equal(teacher, student)
    embed, chosen = net.layer.router.expert_embed, teacher if training and not frozen else student

    def naive(x):
        """(2) and (9)."""
        pairs = zip(x.flatten(0, 1), chosen, strict=True)
        rows = [(embed[e] @ t).sigmoid() * expert(net.layer.experts, e, t) for t, e in pairs]
        return torch.stack(rows).view_as(x)

    found = assert_by_hand(net, naive, x, rtol=1e-4, atol=1e-5)
    assert all(found[f'layer.{name}'].any() for name in EXPERTS | LEARNED)


def test_output_and_every_gradient_of_one_stage(make_layer):
    net = make_layer('stablemoe', preset='group')
    embed = net.layer.router.expert_embed

    def naive(x):
        """The two best of E_i . x / |E_i|, by the softmax of both."""
        out = []
        for token in x.flatten(0, 1):
            best = (F.normalize(embed, dim=-1) @ token).topk(2)
            pairs = zip(best.values.softmax(dim=0), best.indices, strict=True)
            out.append(sum(gate * expert(net.layer.experts, e, token) for gate, e in pairs))
        return torch.stack(out).view_as(x)

    assert_by_hand(net, naive, torch.randn(4, 6, D), rtol=1e-4, atol=1e-5)


EXPERTS = {f'experts.fc{i}.{kind}' for i in (1, 2) for kind in ('weight', 'bias')}
DISTILLED = {'router.distilled.project', 'router.distilled.expert_embed'}
LEARNED = {'router.expert_embed'}


def test_each_loss_of_stage_1_moves_its_router_only(make_layer):
    net, x = make_layer('stablemoe'), torch.randn(4, 6, D).requires_grad_()
    for loss, parameters in {'distill': DISTILLED, 'balance': LEARNED}.items():
        with collect_losses(net, update_state=False) as collected:
            net(x)
            assert moved(net, collected.losses[f'layer/{loss}']) == parameters
        # hard targets, raw patches without a graph
        assert (x.grad is None) == (loss == 'distill')


@pytest.mark.parametrize('steps', [1, 3])
def test_the_router_freezes_after_exactly_stage1_steps(make_layer, steps):
    net = make_layer('stablemoe', stage1_steps=steps)
    frozen = []
    for _ in range(steps + 1):
        train(net, 1)
        frozen.append(net.layer.router.distilled.frozen.item())
    # after the step of the optimizer that follows the block, so when the next block opens
    assert frozen == [False] * steps + [True]


def test_stage_1_is_a_tenth_of_the_training_that_is_announced(make_model):
    model = make_model('stablemoe')
    for announced, steps in ((None, 6000), (50, 5), (3, 1)):  # None: nobody has said how long
        if announced:
            start_training(model, announced)
        assert [block.mlp.stage1_steps for block in model.blocks] == [steps, steps]
    for updates in (0, 1.5, True, '50'):
        refused(f'num_updates={updates!r} is not possible', start_training, model, updates)


def test_stage_2_keeps_the_router_under_momentum_and_weight_decay(make_layer, choices):
    net, x = make_layer('stablemoe', stage1_steps=3), torch.randn(4, 50, D)
    train(net, 3)
    distilled = net.layer.router.distilled
    # as the optimizer has left it: its third step came after the third block
    before = {name: getattr(distilled, name).clone() for name in distilled.names}
    others = {name: p.clone() for name, p in net.layer.named_parameters()}
    expected = choices(net.eval(), x)[0]
    train(net.train(), 10)
    assert all(torch.equal(distilled.weight(name), value) for name, value in before.items())
    assert torch.equal(choices(net, x)[0], expected)
    assert torch.equal(choices(net.eval(), x)[0], expected)
    after = dict(net.layer.named_parameters())
    for name in LEARNED | EXPERTS:
        assert not torch.equal(others[name], after[name]), name


def test_restarting_stage_1_keeps_the_frozen_router_and_learns_on(make_layer, choices):
    net, x = make_layer('stablemoe', stage1_steps=2), torch.randn(4, 50, D)
    train(net, 5)
    distilled = net.layer.router.distilled
    before = {name: distilled.weight(name).clone() for name in distilled.names}
    # weight decay went on pulling at the parameters behind the frozen copy
    assert not torch.equal(distilled.project, before['project'])
    assert restart(net) == ['1 layers that were frozen learn to route again, in a first stage']
    assert not distilled.frozen and distilled.steps == 0
    assert all(torch.equal(distilled.weight(name), value) for name, value in before.items())
    assert torch.equal(choices(net.eval(), x)[0][:, 0], student_choice(net, x))
    train(net.train(), 2)
    assert not torch.equal(distilled.weight('project'), before['project'])
    assert not distilled.frozen
    train(net, 1)
    assert distilled.frozen


def test_raw_patches_are_averaged_to_four_by_four_cells():
    # one channel, 2 x 3 patches of 8 x 8 pixels; pixel value = 100 * cell row + cell column
    rows, columns = torch.arange(16) // 2, torch.arange(24) // 2
    image = (100.0 * rows[:, None] + columns[None])[None, None]
    patches = stablemoe.read_patches(image, (2, 3))
    assert patches.shape == (1, 6, 16)
    # patch (1, 2) holds cell rows 4..7 and cell columns 8..11, row by row
    expected = [100.0 * row + column for row in range(4, 8) for column in range(8, 12)]
    assert patches[0, 5].tolist() == expected


def test_prefix_tokens_come_first_and_are_learned():
    router = DistilledRouter(in_chans=1, num_experts=E, num_prefix_tokens=2)
    cells = torch.randn(3, 5, 16)
    scores = router(cells).view(3, 7, E)
    expected = router.prefix @ router.expert_embed.t()
    torch.testing.assert_close(scores[:, :2], expected.expand(3, 2, E))
    torch.testing.assert_close(scores[:, 2:], cells @ router.project.t() @ router.expert_embed.t())
    assert router.project.shape == (stablemoe.DISTILLED_WIDTH, 16)


def test_without_raw_patches_routing_is_refused():
    router = StableRouter(D, StableMoEConfig(num_experts=E), Host(4, in_chans=1))
    refused(r'was shown none: .* as a whole', router, torch.randn(3, D), error=RuntimeError)
