"""One start for every row of a comparison: what two models have in common begins equal.

Methods draw different numbers of random values. So tensors that a row shares with the dense model
of its shape are that model's, and experts are drawn from the seed alone too.
"""

from typing import Any

import timm
import torch

from . import shipped
from .hosts import method_of
from .layers import moe_options, scale_fresh_experts
from .moe_vit import SparseModel


def share_start(model: Any, model_name: str, seed: int, **kwargs: Any) -> None:
    """Set a freshly built model to the start that all rows of its shape have at a seed."""
    if any(kwargs.get(name) for name in ('pretrained', 'checkpoint_path', 'upcycle')):
        return
    sparse = isinstance(model, SparseModel)
    if sparse:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            seeds = torch.randint(2**62, (len(model.blocks), 2)).tolist()
            for block, pair in zip(model.blocks, seeds, strict=True):
                if hasattr(block.mlp, 'experts'):
                    for part, own in zip(('fc1', 'fc2'), pair, strict=True):
                        torch.manual_seed(own)
                        block.mlp.experts.get_submodule(part).init_weights()
        scale_fresh_experts(model)
        options = moe_options(model.method) | {'upcycling'}
        kwargs = {name: value for name, value in kwargs.items() if name not in options}
        if method_of(model_name) is not None:
            stem = model_name.partition('.')[0].rpartition('_')[0]
            is_shipped = timm.models.is_model_in_modules(model_name, ['shipped'])
            model_name = shipped.DENSE if is_shipped else f'{stem}_patch16_224'
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        dense = timm.create_model(model_name, **kwargs)
    state = model.state_dict()
    theirs = dense.state_dict().items()
    shared = {k: v for k, v in theirs if k in state and state[k].shape == v.shape}
    model.load_state_dict(shared, strict=False)
