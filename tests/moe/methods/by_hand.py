"""VQMoE read plainly from its equations, and which parameters a loss moves."""

import torch
import torch.nn.functional as F

D, E = 8, 4


def expert(layer, e, x):
    """(1): f_e of a vector."""
    experts = layer.experts
    hidden = F.gelu(experts.fc1.weight[e] @ x + experts.fc1.bias[e])
    return experts.fc2.weight[e] @ hidden + experts.fc2.bias[e]


def naive(layer, x):
    """Equations (1) to (5) for tokens (T, D), one token after the other; values only."""
    config, out = layer.config, []
    for token in x:
        branches = []
        if config.form != 'discrete':
            probs = (layer.router.weight @ token).softmax(dim=0)
            best = int(probs.argmax())
            weight = config.routed_scaling_factor * probs[best] if config.train_router else 1.0
            branches.append(weight * expert(layer, best, token))
        if config.form != 'continuous':
            codes = layer.quantizer.codebook.codes()
            if config.use_cosine_sim:
                q = int((codes @ token).argmax())
                codes = codes * token.norm()
            else:
                q = int((codes - token).square().sum(dim=1).argmin())
            read = {
                'token': token,
                'ste': codes[q],
                'mix': (1 - config.code_share) * token + config.code_share * codes[q],
                'official': (1 - 2 * config.code_share) * token + config.code_share * codes[q],
            }[config.expert_input]
            answer = expert(layer, q % E, layer.quantizer.norm(read))
            branches.append(layer.output_norm(answer) if config.output_norm else answer)
        if config.form == 'full':
            gate = (layer.gate.weight @ token + layer.gate.bias).softmax(dim=0)
            out.append(gate[0] * branches[0] + gate[1] * branches[1])
        else:
            out.append(branches[0])
    return torch.stack(out)


def moved(net, loss):
    """Names of the parameters with a gradient that is not zero."""
    net.zero_grad()
    loss.backward()
    parameters = net.layer.named_parameters()
    return {name for name, p in parameters if p.grad is not None and p.grad.any()}
