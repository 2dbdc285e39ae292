"""StableMoE: two stages, what each gradient reaches, and that the second stage does not move."""

import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F

from vqmoe_vision.moe import collect_losses, losses, restart, start_training
from vqmoe_vision.moe.methods.stablemoe import (
    DISTILLED_WIDTH,
    DistilledRouter,
    EmbeddingRouter,
    StableMoEConfig,
    StableRouter,
    read_patches,
)
from vqmoe_vision.moe.raw_patches import Host, RawPatches

D, E = 8, 4


def teacher_choice(net, x):
    """(1): argmax of E_i . h for all tokens."""
    return (x.flatten(0, 1) @ net.layer.router.expert_embed.t()).argmax(dim=1)


def student_choice(net, x):
    """(6): argmax of E^_i . D(X); the raw patch of the tests is the token twice."""
    distilled = net.layer.router.distilled
    features = torch.cat([x, x], dim=-1).flatten(0, 1) @ distilled.weight('project').t()
    return (features @ distilled.weight('expert_embed').t()).argmax(dim=1)


def freeze(net):
    """Move a layer to stage 2."""
    net.layer.router.distilled.freeze(torch.tensor(True))
    return net


def train(net, steps, x=None):
    """AdamW with momentum and strong weight decay."""
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.05, weight_decay=0.5)
    for _ in range(steps):
        with collect_losses(net) as collected:
            inputs = torch.randn(4, 6, D) if x is None else x
            loss = (net(inputs) - 1).square().mean() + collected.total()
            optimizer.zero_grad()
            loss.backward()
        optimizer.step()


# --- who assigns


def test_stage_1_trains_with_the_learned_router_and_evaluates_with_the_distilled(
    make_layer, choices
):
    net, x = make_layer('stablemoe'), torch.randn(4, 50, D)
    teacher, student = teacher_choice(net, x), student_choice(net, x)
    assert not torch.equal(teacher, student)
    assert torch.equal(choices(net, x)[0][:, 0], teacher)
    assert torch.equal(choices(net.eval(), x)[0][:, 0], student)


def test_stage_2_assigns_by_the_distilled_router(make_layer, choices):
    net, x = freeze(make_layer('stablemoe')), torch.randn(4, 50, D)
    for training in (True, False):
        assert torch.equal(choices(net.train(training), x)[0][:, 0], student_choice(net, x))


@pytest.mark.parametrize('frozen', [False, True])
@pytest.mark.parametrize('training', [False, True])
def test_the_gate_is_the_sigmoid_of_the_learned_score(make_layer, frozen, training):
    net, x = make_layer('stablemoe').train(training), torch.randn(4, 6, D)
    if frozen:
        freeze(net)
    net.read(x)
    tokens = x.flatten(0, 1)
    routing = net.layer.router(tokens)
    scores = tokens @ net.layer.router.expert_embed.t()
    torch.testing.assert_close(routing.weights, scores.gather(1, routing.indices).sigmoid())


def test_two_experts_are_the_two_best(make_layer, choices):
    net, x = make_layer('stablemoe', top_k=2), torch.randn(4, 6, D)
    scores = x.flatten(0, 1) @ net.layer.router.expert_embed.t()
    assert torch.equal(choices(net, x)[0], scores.topk(2, dim=-1).indices)


def test_stage_2_ignores_the_hidden_token(make_layer):
    net, x = freeze(make_layer('stablemoe')), torch.randn(4, 6, D)
    net.read(x)
    router = net.layer.router
    first = router(torch.randn(24, D)).indices
    assert torch.equal(first, router(100 * torch.randn(24, D)).indices)


# --- losses and what they reach


def test_losses_of_stage_1(make_layer):
    net = make_layer('stablemoe', balance_weight=0.3, distill_weight=2.0)
    x = torch.randn(4, 6, D)
    net.read(x)
    router, tokens = net.layer.router, x.flatten(0, 1)
    routing = router(tokens)
    student = router.distilled(net.raw_patches.value)
    target = teacher_choice(net, x)
    torch.testing.assert_close(routing.losses['distill'], 2.0 * F.cross_entropy(student, target))
    expected = 0.3 * losses.overload(routing.weights, routing.indices, E).value()
    torch.testing.assert_close(routing.losses['balance'].value(), expected)


def test_distillation_known_answer(make_layer):
    # a student without an opinion: -log(1 / E) = ln 4
    net = make_layer('stablemoe')
    torch.nn.init.zeros_(net.layer.router.distilled.expert_embed)
    with collect_losses(net) as collected:
        net(torch.randn(4, 6, D))
        assert collected.losses['layer/distill'].item() == pytest.approx(math.log(4))


def test_stage_2_and_eval_have_no_losses(make_layer):
    net, x = freeze(make_layer('stablemoe')), torch.randn(4, 6, D)
    with collect_losses(net) as collected:
        net(x)
        assert collected.total().item() == 0
        collected.total().backward()
    assert all(p.grad is None or not p.grad.any() for p in net.parameters())
    with collect_losses(net.eval()) as collected:
        net(x)
        assert collected.losses == {}


def gradients(net, loss):
    """Names of the parameters that a loss moves."""
    net.zero_grad()
    loss.backward()
    return {name for name, p in net.layer.named_parameters() if p.grad is not None and p.grad.any()}


EXPERTS = {f'experts.fc{i}.{kind}' for i in (1, 2) for kind in ('weight', 'bias')}
DISTILLED = {'router.distilled.project', 'router.distilled.expert_embed'}
LEARNED = {'router.expert_embed'}


def test_the_task_moves_experts_and_the_learned_router_only(make_layer):
    net = make_layer('stablemoe')
    assert gradients(net, net(torch.randn(4, 6, D)).square().sum()) == EXPERTS | LEARNED
    freeze(net)
    assert gradients(net, net(torch.randn(4, 6, D)).square().sum()) == EXPERTS | LEARNED


def test_each_loss_of_stage_1_moves_its_router_only(make_layer):
    net, x = make_layer('stablemoe'), torch.randn(4, 6, D).requires_grad_()
    with collect_losses(net, update_state=False) as collected:
        net(x)
        terms = collected.losses
        assert gradients(net, terms['layer/distill']) == DISTILLED
        assert x.grad is None  # hard targets, raw patches without a graph
    with collect_losses(net, update_state=False) as collected:
        net(x)
        assert gradients(net, collected.losses['layer/balance']) == LEARNED


# --- the switch


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
    layers = [block.mlp for block in model.blocks]
    assert [layer.stage1_steps for layer in layers] == [6000, 6000]  # nobody has said how long
    start_training(model, 50)
    assert [layer.stage1_steps for layer in layers] == [5, 5]
    start_training(model, 3)
    assert [layer.stage1_steps for layer in layers] == [1, 1]
    for updates in (0, 1.5, True, '50'):
        with pytest.raises(ValueError, match=f'num_updates={updates!r} is not possible'):
            start_training(model, updates)


def test_a_fraction_of_the_users(make_model):
    model = make_model('stablemoe', stage1_fraction=0.5)
    start_training(model, 50)
    assert model.blocks[0].mlp.stage1_steps == 25


def test_steps_that_the_user_gave_are_kept(make_model):
    model = make_model('stablemoe', stage1_steps=7)
    start_training(model, 50)
    assert model.blocks[0].mlp.stage1_steps == 7


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
    # while the gate and the experts go on
    after = dict(net.layer.named_parameters())
    for name in LEARNED | EXPERTS:
        assert not torch.equal(others[name], after[name]), name


def test_the_frozen_router_is_the_one_learned_until_then(make_layer):
    net = make_layer('stablemoe')
    distilled = net.layer.router.distilled
    before = {name: distilled.weight(name).clone() for name in distilled.names}
    freeze(net)
    assert all(torch.equal(distilled.weight(name), value) for name, value in before.items())


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


def test_restarting_in_stage_1_only_counts_from_0(make_layer):
    net = make_layer('stablemoe', stage1_steps=3)
    train(net, 2)
    distilled = net.layer.router.distilled
    before = distilled.project.clone()
    assert restart(net) == []
    assert distilled.steps == 0 and torch.equal(distilled.project, before)


@pytest.mark.parametrize('steps', [2, 5], ids=['stage 1', 'stage 2'])
def test_the_stage_is_in_the_state_dict_and_training_resumes(make_layer, choices, steps):
    net = make_layer('stablemoe', stage1_steps=4)
    train(net, steps)
    resumed = make_layer('stablemoe', stage1_steps=4)
    resumed.load_state_dict(net.state_dict())
    x = torch.randn(4, 50, D)
    for _ in range(3):  # from step 2 this passes the switch
        assert torch.equal(choices(resumed, x)[0], choices(net, x)[0])
        for each in (net, resumed):
            torch.manual_seed(5)
            train(each, 1)
    assert net.layer.router.distilled.frozen
    assert all(torch.equal(resumed.state_dict()[k], v) for k, v in net.state_dict().items())


def test_the_distilled_router_learns_to_agree(make_layer):
    # the learned router is a function of the raw patch here, so the student can imitate it
    net, x = make_layer('stablemoe'), torch.randn(4, 50, D)
    with torch.no_grad():
        net.layer.router.distilled.project.mul_(0.1)

    def agreement():
        with collect_losses(net, update_state=False) as collected:
            net(x)
        return collected.stats['layer/agreement'].item()

    before = agreement()
    teacher = teacher_choice(net, x)
    optimizer = torch.optim.Adam(net.layer.router.distilled.parameters(), lr=0.01)
    for _ in range(60):
        with collect_losses(net) as collected:
            net(x)
            optimizer.zero_grad()
            collected.total().backward()
        optimizer.step()
    assert torch.equal(teacher_choice(net, x), teacher)
    assert before < 0.6
    assert agreement() > 0.9


# --- raw patches and prefix tokens


def test_raw_patches_are_averaged_to_four_by_four_cells():
    # one channel, 2 x 3 patches of 8 x 8 pixels; pixel value = 100 * cell row + cell column
    rows, columns = torch.arange(16) // 2, torch.arange(24) // 2
    image = (100.0 * rows[:, None] + columns[None])[None, None]
    patches = read_patches(image, (2, 3))
    assert patches.shape == (1, 6, 16)
    # patch (1, 2) holds cell rows 4..7 and cell columns 8..11, row by row
    expected = [100.0 * row + column for row in range(4, 8) for column in range(8, 12)]
    assert patches[0, 5].tolist() == expected


def test_raw_patches_keep_channels_apart_and_no_graph():
    image = torch.stack([torch.zeros(4, 4), torch.ones(4, 4)])[None].requires_grad_()
    patches = read_patches(image, (1, 1))
    assert patches[0, 0].tolist() == [0.0] * 16 + [1.0] * 16
    assert not patches.requires_grad


@pytest.mark.parametrize('duplicate', [copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))])
def test_copies_of_raw_patches_start_empty(duplicate):
    patches = RawPatches()
    patches.value = torch.ones(1, 1, 16)
    assert duplicate(patches).value is None


def test_prefix_tokens_come_first_and_are_learned():
    router = DistilledRouter(in_chans=1, num_experts=E, num_prefix_tokens=2)
    cells = torch.randn(3, 5, 16)
    scores = router(cells).view(3, 7, E)
    expected = router.prefix @ router.expert_embed.t()
    torch.testing.assert_close(scores[:, :2], expected.expand(3, 2, E))
    torch.testing.assert_close(scores[:, 2:], cells @ router.project.t() @ router.expert_embed.t())
    assert router.project.shape == (DISTILLED_WIDTH, 16)


def test_without_raw_patches_routing_is_refused():
    router = StableRouter(D, StableMoEConfig(num_experts=E), Host(4, in_chans=1))
    with pytest.raises(RuntimeError, match=r'was shown none: .* as a whole'):
        router(torch.randn(3, D))


# --- the preset of the published tables


def test_group_preset_is_one_stage_and_ignores_expert_lengths(make_layer, choices):
    net, x = make_layer('stablemoe', preset='group'), torch.randn(4, 6, D)
    router, tokens = net.layer.router, x.flatten(0, 1)
    scores = tokens @ F.normalize(router.expert_embed, dim=-1).t()
    expected = scores.topk(2, dim=-1)
    routing = router(tokens)
    assert torch.equal(routing.indices, expected.indices)
    torch.testing.assert_close(routing.weights, expected.values.softmax(dim=-1))
    assert routing.losses == {}
    before = choices(net, x)[0]
    with torch.no_grad():
        router.expert_embed *= torch.tensor([[0.5], [3.0], [20.0], [1.0]])
    assert torch.equal(choices(net, x)[0], before)


def test_group_preset_starts_with_the_length_of_the_tables_code():
    """`orthogonal_(gain=0.32)`: by its length a step turns an embedding."""
    config = StableMoEConfig.from_options(preset='group', num_experts=4)
    embed = EmbeddingRouter(D, config).expert_embed
    torch.testing.assert_close(embed.norm(dim=-1), torch.full((len(embed),), 0.32))
