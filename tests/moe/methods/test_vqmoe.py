"""VQMoE against a plain reading of its equations, token by token."""

import pytest
import torch
import torch.nn.functional as F

from vqmoe_vision.moe import collect_losses, losses
from vqmoe_vision.moe.codebooks import CODEBOOKS
from vqmoe_vision.moe.methods.vqmoe import EXPERT_INPUTS, FORMS, Quantizer, VQMoEConfig

from .by_hand import D, E, moved, naive

SHARE = 0.3  # of the code; the default 0.05 would hide a mistake
every_input = pytest.mark.parametrize('expert_input', EXPERT_INPUTS)


def reading(expert_input):
    """Options of a reading, with a code share where it has an effect."""
    share = {'code_share': SHARE} if expert_input in ('mix', 'official') else {}
    return {'expert_input': expert_input, **share}


@every_input
@pytest.mark.parametrize('form', ['full', 'discrete'])
@pytest.mark.parametrize('num_codes', [E, 3 * E])
def test_output_is_the_equations(make_layer, form, expert_input, num_codes):
    net = make_layer('vqmoe', form=form, num_codes=num_codes, **reading(expert_input))
    x = torch.randn(3, 20, D)
    torch.testing.assert_close(net(x).flatten(0, 1), naive(net.layer, x.flatten(0, 1)))


def test_output_of_the_continuous_form_is_the_equations(make_layer):
    net = make_layer('vqmoe', form='continuous')
    x = torch.randn(3, 20, D)
    torch.testing.assert_close(net(x).flatten(0, 1), naive(net.layer, x.flatten(0, 1)))


@pytest.mark.parametrize(
    'options',
    [
        {'preset': 'official', 'code_share': SHARE},
        {'preset': 'paper'},
        {'output_norm': True},
        {'input_norm': False},
        {'input_norm': False, 'output_norm': True, 'form': 'discrete', 'expert_input': 'ste'},
        *({'codebook': name} for name in CODEBOOKS),
        *({'codebook': name, 'use_cosine_sim': True, 'code_share': SHARE} for name in CODEBOOKS),
        {'rotation_trick': True, 'code_share': SHARE},
        {'routed_scaling_factor': 2.75},
    ],
    ids=str,
)
def test_output_of_every_option_is_the_equations(make_layer, options):
    net = make_layer('vqmoe', **options)
    with torch.no_grad():
        for norm in (net.layer.quantizer.norm, net.layer.output_norm):
            if isinstance(norm, torch.nn.LayerNorm):
                norm.weight.uniform_(0.5, 2)
                norm.bias.uniform_(-1, 1)
    x = torch.randn(3, 20, D)
    torch.testing.assert_close(net(x).flatten(0, 1), naive(net.layer, x.flatten(0, 1)))


@pytest.mark.parametrize('expert_input', ['token', 'ste'])
def test_one_expert_and_one_code_are_two_dense_branches(make_layer, expert_input):
    # r = 1 and q = 0: y = g_c f(x) + g_d f(x~), which is f(x) if the code is only an index
    net = make_layer('vqmoe', num_experts=1, expert_input=expert_input, input_norm=False)
    layer, x = net.layer, torch.randn(2, 5, D)
    fc1, fc2 = layer.experts.fc1, layer.experts.fc2

    def dense(tokens):
        hidden = F.gelu(F.linear(tokens, fc1.weight[0], fc1.bias[0]))
        return F.linear(hidden, fc2.weight[0], fc2.bias[0])

    gate = layer.gates(x.flatten(0, 1)).view(2, 5, 2)
    read = x if expert_input == 'token' else layer.quantizer.codebook.codes().expand(2, 5, D)
    expected = gate[..., :1] * dense(x) + gate[..., 1:] * dense(read)
    torch.testing.assert_close(net(x), expected)
    if expert_input == 'token':
        torch.testing.assert_close(net(x), dense(x))


# --- what the experts of the discrete branch read


@pytest.mark.parametrize(
    ('expert_input', 'of_token', 'of_code', 'gradient'),
    [
        ('mix', 1 - SHARE, SHARE, 1.0),
        ('ste', 0.0, 1.0, 1.0),
        ('official', 1 - 2 * SHARE, SHARE, 1 - SHARE),
        ('token', 1.0, 0.0, 1.0),
    ],
)
def test_value_and_gradient_of_every_reading(expert_input, of_token, of_code, gradient):
    quantizer = Quantizer(D, VQMoEConfig(**reading(expert_input)))
    x = torch.randn(5, D, dtype=torch.float64, requires_grad=True)
    code = torch.randn(5, D, dtype=torch.float64, requires_grad=True)
    out = quantizer.expert_input(x, code)
    torch.testing.assert_close(out, of_token * x + of_code * code)
    weights = torch.randn(5, D, dtype=torch.float64)
    (out * weights).sum().backward()
    torch.testing.assert_close(x.grad, gradient * weights)
    assert code.grad is None


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16])
def test_ste_feeds_exactly_the_code_whatever_the_precision(dtype):
    quantizer = Quantizer(D, VQMoEConfig(expert_input='ste'))
    x, code = (10 * torch.randn(5, D)).to(dtype).requires_grad_(), torch.randn(5, D).to(dtype) / 8
    out = quantizer.expert_input(x, code)
    weights = torch.randn(5, D).to(dtype)
    out.backward(weights)
    assert torch.equal(out, code) and torch.equal(x.grad, weights)


@every_input
def test_the_code_decides_only_as_much_as_the_reading_says(make_layer, expert_input):
    # same code: outputs of two tokens differ unless the expert reads the code alone
    net = make_layer('vqmoe', form='discrete', expert_input=expert_input, num_codes=E)
    with torch.no_grad():
        net.layer.quantizer.codebook.embed.add_(100.0)
        net.layer.quantizer.codebook.embed[2] = 0.0  # the only near one
    first, second = net(torch.randn(1, 2, D))[0]
    assert torch.allclose(first, second, atol=1e-5) == (expert_input == 'ste')


@pytest.mark.parametrize('num_codes', [E, 2 * E, 5 * E])
def test_code_q_belongs_to_expert_q_mod_e(make_layer, num_codes):
    # tokens that are the codes: token q takes code q; experts answer with their own number
    net = make_layer('vqmoe', form='discrete', num_codes=num_codes)
    with torch.no_grad():
        net.layer.experts.fc2.weight.zero_()
        net.layer.experts.fc2.bias.copy_(torch.arange(float(E))[:, None].expand(E, D))
    x = net.layer.quantizer.codebook.codes().clone()
    out = net(x[None])[0, :, 0]
    assert out.tolist() == [q % E for q in range(num_codes)]


# --- the gate and the forms


@pytest.mark.parametrize(('form', 'bias'), [('continuous', [500, -500]), ('discrete', [-500, 500])])
def test_a_shut_gate_equals_the_single_branch(make_layer, form, bias):
    full, single = make_layer('vqmoe'), make_layer('vqmoe', form=form)
    missing, _ = single.load_state_dict(full.state_dict(), strict=False)
    assert missing == []
    with torch.no_grad():
        full.layer.gate.weight.zero_()
        full.layer.gate.bias.copy_(torch.tensor(bias, dtype=torch.float32))
    x = torch.randn(3, 20, D)
    torch.testing.assert_close(full(x), single(x))


def test_the_gate_starts_even(make_layer):
    net = make_layer('vqmoe')
    net.layer.init_weights()
    torch.testing.assert_close(net.layer.gates(torch.randn(5, D)), torch.full((5, 2), 0.5))


def test_gates_sum_to_one(make_layer):
    gates = make_layer('vqmoe').layer.gates(torch.randn(50, D))
    torch.testing.assert_close(gates.sum(dim=1), torch.ones(50))
    assert gates.std() > 0.1


def test_forms_have_only_their_parts(make_layer):
    parts = {
        form: {name.split('.')[1] for name in make_layer('vqmoe', form=form).state_dict()}
        for form in FORMS
    }
    assert parts == {
        'full': {'experts', 'router', 'quantizer', 'gate'},
        'discrete': {'experts', 'quantizer'},
        'continuous': {'experts', 'router'},
    }


def test_continuous_form_has_top_1_probabilities_as_weights(make_layer):
    net, x = make_layer('vqmoe', form='continuous'), torch.randn(2, 5, D)
    routing = net.layer.router(x.flatten(0, 1))
    probs = (x.flatten(0, 1) @ net.layer.router.weight.t()).softmax(dim=-1)
    torch.testing.assert_close(routing.weights[:, 0], probs.max(dim=-1).values)


# --- what learns from what


EXPERTS = {f'experts.fc{i}.{kind}' for i in (1, 2) for kind in ('weight', 'bias')}
NORM = {'quantizer.norm.weight', 'quantizer.norm.bias'}
GATE = {'gate.weight', 'gate.bias'}


@pytest.mark.parametrize('codebook', CODEBOOKS)
@every_input
def test_the_task_moves_all_but_the_codes(make_layer, codebook, expert_input):
    net = make_layer('vqmoe', codebook=codebook, expert_input=expert_input)
    task = net(torch.randn(3, 20, D)).square().sum()
    assert moved(net, task) == EXPERTS | NORM | GATE | {'router.weight'}


@pytest.mark.parametrize(
    ('codebook', 'codes'),
    [
        ('ema', set()),
        ('plain', {'quantizer.codebook.embed'}),
        ('cvq', {'quantizer.codebook.embed'}),
        ('simvq', {'quantizer.codebook.project.weight', 'quantizer.codebook.project.bias'}),
    ],
)
def test_the_vq_loss_moves_codes_and_tokens(make_layer, codebook, codes):
    net, x = make_layer('vqmoe', codebook=codebook), torch.randn(3, 20, D, requires_grad=True)
    with collect_losses(net, update_state=False) as collected:
        net(x)
        assert moved(net, collected.losses['layer/vq']) == codes
    assert (x.grad != 0).any(dim=-1).all()


def test_the_balance_loss_moves_the_router(make_layer):
    net = make_layer('vqmoe')
    with collect_losses(net, update_state=False) as collected:
        net(torch.randn(3, 20, D))
        assert moved(net, collected.losses['layer/balance']) == {'router.weight'}


def test_the_gate_learns_which_branch_serves_the_task(make_layer):
    # the experts answer 1; the discrete branch passes LayerNorm, which makes it 0
    net = make_layer('vqmoe', output_norm=True, train_router=False, balance_weight=0.0)
    net.layer.init_weights()
    with torch.no_grad():
        net.layer.experts.fc2.weight.zero_()
        net.layer.experts.fc2.bias.fill_(1.0)
    (net(torch.randn(3, 20, D)) - 1).square().sum().backward()
    # y = g_c * 1 + g_d * 0: descent raises the continuous gate
    assert net.layer.gate.bias.grad[0] < 0 < net.layer.gate.bias.grad[1]


def test_official_preset_leaves_the_router_at_its_start_with_weight_one(make_layer):
    net, x = make_layer('vqmoe', preset='official'), torch.randn(3, 20, D)
    assert not net.layer.router.weight.requires_grad
    torch.testing.assert_close(net(x).flatten(0, 1), naive(net.layer, x.flatten(0, 1)))
    with collect_losses(net) as collected:
        net(x)
    assert set(collected.losses) == {'layer/vq'}


# --- losses, statistics, state


def test_losses_are_weighted(make_layer):
    net = make_layer('vqmoe', vq_weight=0.5, balance_weight=0.25, commitment=2.0)
    x = torch.randn(3, 20, D)
    tokens = x.flatten(0, 1)
    codes = net.layer.quantizer.codebook.codes()
    nearest = torch.cdist(tokens, codes).min(dim=1)
    probs = (tokens @ net.layer.router.weight.t()).softmax(dim=-1)
    chosen = probs.argmax(dim=1, keepdim=True)
    with collect_losses(net, update_state=False) as collected:
        net(x)
    expected = {
        # ema: beta * mean over tokens and channels, no codebook term
        'layer/vq': 0.5 * 2.0 * nearest.values.square().mean() / D,
        'layer/balance': 0.25 * losses.load_balance(probs, chosen).value(),
    }
    torch.testing.assert_close(dict(collected.losses), expected)


def test_statistics(make_layer):
    net, x = make_layer('vqmoe', num_codes=3 * E), torch.randn(3, 20, D)
    tokens, layer = x.flatten(0, 1), net.layer
    q = torch.cdist(tokens, layer.quantizer.codebook.codes()).argmin(dim=1)
    first = (tokens @ layer.router.weight.t()).argmax(dim=1)
    usage = torch.bincount(q, minlength=3 * E) / 60
    error = (tokens - layer.quantizer.codebook.codes()[q]).square().mean()
    with collect_losses(net, update_state=False) as collected:
        net(x)
    expected = {
        # of both branches
        'load': torch.bincount(torch.cat([first, q % E]), minlength=E) / 120,
        'code_usage': usage,
        'nonfinite_tokens': torch.tensor(0.0),
        'quantization_error': error / tokens.square().mean(),
        'gate_continuous': layer.gates(tokens)[:, 0].mean(),
        'agreement': (first == q % E).float().mean(),
    }
    actual = {name.removeprefix('layer/'): value for name, value in collected.stats.items()}
    torch.testing.assert_close(actual, expected)
    assert not any(value.requires_grad for value in collected.stats.values())


def test_the_quantization_error_of_directions_is_of_the_tokens_energy(make_layer):
    # the only code is at a cosine of 0.6 to all tokens: |x - |x| v|^2 = |x|^2 (1 + 1 - 2 * 0.6) is
    # 0.8 of the energy at every length
    net = make_layer('vqmoe', num_experts=1, use_cosine_sim=True)
    with torch.no_grad():
        net.layer.quantizer.codebook.embed.copy_(torch.eye(D)[:1])
    x = torch.zeros(1, 3, D)
    x[..., 0], x[..., 1] = 0.6, 0.8
    with collect_losses(net, update_state=False) as collected:
        net(x * torch.tensor([0.1, 1.0, 10.0])[:, None])
    assert collected.summary()['layer/quantization_error'] == pytest.approx(0.8)


@pytest.mark.parametrize('form', ['full', 'discrete'])
def test_the_codebook_learns_from_a_block_and_only_there(make_layer, form):
    net, x = make_layer('vqmoe', form=form), torch.randn(3, 20, D)
    codebook = net.layer.quantizer.codebook
    before = codebook.codes().clone()
    net(x)
    net.eval()
    with collect_losses(net):
        net(x)
    assert torch.equal(codebook.codes(), before)
    net.train()
    with collect_losses(net):
        net(x)
        assert torch.equal(codebook.codes(), before)
    assert not torch.equal(codebook.codes(), before)


def test_default_codebook_survives_a_common_mean(make_layer):
    # the layer as it is built, on tokens that share a large mean
    torch.manual_seed(0)
    net = make_layer('vqmoe', num_experts=8, expert_input='ste')
    net.layer.quantizer.codebook.init_weights()
    with collect_losses(net) as collected:
        net(torch.randn(4, 100, D) + 10)
    assert collected.summary()['layer/code_usage_perplexity'] < 4
    for _ in range(5):
        with collect_losses(net) as collected:
            net(torch.randn(4, 100, D) + 10)
    assert collected.summary()['layer/code_usage_perplexity'] > 4


@pytest.mark.parametrize(('form', 'branches'), [('full', 2), ('discrete', 1), ('continuous', 1)])
def test_an_expert_per_branch_is_active(make_layer, form, branches):
    layer = make_layer('vqmoe', form=form).layer
    # an expert: 280 parameters
    assert layer.idle_params() == (E - branches) * 280


@pytest.mark.parametrize('name', CODEBOOKS)
@pytest.mark.parametrize('learns', [True, False], ids=['learning', 'fixed'])
def test_fixed_codes_stay_and_tokens_are_still_drawn_to_them(make_layer, name, learns):
    # token -> code -> expert: with the token alone no gradient but that of the loss reaches it
    options = {'form': 'discrete', 'codebook': name, 'train_codebook': learns, 'vq_weight': 1.0}
    net = make_layer('vqmoe', **options).train()
    book, x = net.layer.quantizer.codebook, torch.randn(2, 16, D, requires_grad=True)
    before = {key: value.clone() for key, value in book.state_dict().items()}
    tokens = x.detach().flatten(0, 1)
    # beta = 1/4 of the mean squared distance to the nearest code
    commitment = (
        0.25 * torch.cdist(tokens, book.codes()).amin(dim=1).square().sum() / tokens.numel()
    )
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1, weight_decay=0.1)
    with collect_losses(net) as collected:
        net(x)
        loss = collected.total()
        loss.backward()
        optimizer.step()
    kept = all(torch.equal(before[key], value) for key, value in book.state_dict().items())
    assert kept == (not learns)
    if not learns:
        torch.testing.assert_close(loss, commitment)
        assert x.grad.abs().amax() > 0
