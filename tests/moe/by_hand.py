"""A layer beside a plain reading of its equations: the answer and every gradient."""

import torch
import torch.nn.functional as F


def expert(experts, e, x):
    hidden = F.gelu(experts.fc1.weight[e] @ x + experts.fc1.bias[e])
    return experts.fc2.weight[e] @ hidden + experts.fc2.bias[e]


def answer_and_gradients(net, function, x, cotangent):
    """Of what `function` says of x, with the parameters of `net`; None is a gradient of zero."""
    net.zero_grad()
    x = x.clone().requires_grad_()
    out = function(x)
    (out * cotangent).sum().backward()
    named = {'x': x, **dict(net.named_parameters())}
    grads = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in named.items()}
    return {'out': out.detach(), **{name: grad.clone() for name, grad in grads.items()}}


def assert_by_hand(net, naive, x, **tolerance):
    """`net` answers what `naive` says, with the same gradient of x and of every parameter."""
    cotangent = torch.randn_like(x)
    found = answer_and_gradients(net, net, x, cotangent)
    expected = answer_and_gradients(net, naive, x, cotangent)
    for name, value in expected.items():
        note = lambda text, name=name: f'{name}: {text}'  # noqa: E731
        torch.testing.assert_close(found[name], value, msg=note, **tolerance)
    return found


def moved(net, loss):
    net.zero_grad()
    loss.backward()
    parameters = net.layer.named_parameters()
    return {name for name, p in parameters if p.grad is not None and p.grad.any()}
