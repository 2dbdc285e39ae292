"""Arguments of timm's classes with which a model would fit a checkpoint, told by its names.

All functions take state dicts in timm's names.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .state_dicts import StateDict, shorten

# Where timm has the last norm.
NORMS = ('norm.', 'fc_norm.')
STEM = 'patch_embed.proj.weight'
# By which arguments a network has tensors of such names: with them, and without; None if no value
# takes them away.
Arguments = tuple[tuple[str, dict[str, Any], dict[str, Any] | None], ...]
VIT: Arguments = (
    (r'^cls_token$', {'class_token': True}, {'class_token': False}),
    (r'^reg_token$', {}, {'reg_tokens': 0}),
    (r'^pos_embed$', {'pos_embed': 'learn'}, {'pos_embed': 'none'}),
    (r'^norm_pre\.', {'pre_norm': True}, {'pre_norm': False}),
    # timm takes None for nothing said, and some of its models have a number of their own
    (r'\.ls[12]\.', {'init_values': 1e-5}, {'init_values': 0.0}),
    (r'\.qkv\.bias$', {'qkv_bias': True}, {'qkv_bias': False}),
    (r'\.[qk]_norm\.', {'qk_norm': True}, {'qk_norm': False}),
    (r'\.attn\.norm\.', {'scale_attn_norm': True}, {'scale_attn_norm': False}),
    (r'\.(attn\.proj|fc[12])\.bias$', {'proj_bias': True}, {'proj_bias': False}),
    (r'\.(norm1|in_norm|norm)\.bias$', {'norm_layer': 'layernorm'}, {'norm_layer': 'rmsnorm'}),
)
EVA: Arguments = (
    (r'^cls_token$', {'class_token': True}, {'class_token': False}),
    (r'^reg_token$', {}, {'num_reg_tokens': 0}),
    (r'^pos_embed$', {'use_abs_pos_emb': True}, {'use_abs_pos_emb': False}),
    (r'^norm_pre\.', {'use_pre_transformer_norm': True}, {'use_pre_transformer_norm': False}),
    # a model of a name that has it has it with every number
    (r'\.gamma_[12]$', {'init_values': 1e-5}, None),
    (r'\.(q_bias|q_proj\.bias|qkv\.bias)$', {'qkv_bias': True}, {'qkv_bias': False}),
    (r'\.[qk]_norm\.', {'qk_norm': True}, {'qk_norm': False}),
    (r'\.attn\.qkv\.weight$', {'qkv_fused': True}, {'qkv_fused': False}),
    (r'\.attn\.norm\.', {'scale_attn_inner': True}, {'scale_attn_inner': False}),
    (r'\.mlp\.norm\.', {'scale_mlp': True}, {'scale_mlp': False}),
    (r'\.mlp\.fc1_g\.', {'swiglu_mlp': True}, {'swiglu_mlp': False}),
)


def pooled_otherwise(expected: StateDict, state: StateDict, arguments: Arguments) -> str:
    """Arguments with which a head would be fed as that of a checkpoint, as far as names tell."""
    parts = ('attn_pool.latent', 'norm.weight', 'fc_norm.weight')
    differ = any((name in expected) != (name in state) for name in parts)
    if not differ:
        return ''
    known = in_words(pooling_of(state, arguments))
    alone = 'cls_token' not in state or 'attn_pool.latent' in state
    if alone or known == in_words(no_norm(arguments)):
        return known
    # with a class token names tell where the norm is, and not what it is of
    kinds = ("'avg'", "'token'")
    first, second = kinds if kinds[0] in known else reversed(kinds)
    return f'{known} (or {known.replace(first, second)})'


def without_norm(expected: StateDict, fitted: StateDict, arguments: Arguments) -> tuple[str, ...]:
    """A warning of a last norm that a checkpoint lacks, as that of a backbone without one may."""
    missing = [name for name in expected if name.startswith(NORMS) and name not in fitted]
    if not missing:
        return ()
    return (
        f'the checkpoint has no {shorten(missing)}, so that the last norm is as initialised: '
        f'{in_words(no_norm(arguments))} would fit',
    )


def pooling_of(state: StateDict, kind: Arguments) -> dict[str, Any]:
    """Arguments of a model that most likely pools as a checkpoint."""
    if 'attn_pool.latent' in state:
        return {'global_pool': 'map'}
    behind, of_class = 'fc_norm.weight' in state, 'cls_token' in state
    if not behind and 'norm.weight' not in state:
        return no_norm(kind) if of_class else {'global_pool': 'avg', **no_norm(kind)}
    pool = 'token' if of_class and not behind else 'avg'
    # said in any case: some models of timm have another place for their norm than the class
    return {'global_pool': pool, 'use_fc_norm' if kind is EVA else 'fc_norm': behind}


def no_norm(kind: Arguments) -> dict[str, Any]:
    """Arguments of a model without a last norm."""
    if kind is EVA:
        return {'use_post_transformer_norm': False, 'use_fc_norm': False}
    return {'final_norm': False}


def in_words(arguments: Mapping[str, Any]) -> str:
    """Arguments as a call has them."""
    return ', '.join(f'{name}={value!r}' for name, value in arguments.items())
