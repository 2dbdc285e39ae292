"""Arguments of timm's classes with which a model would fit a checkpoint, told by its names.

All functions take state dicts in timm's names.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from .other_experts import block_of
from .state_dicts import StateDict, is_square, shorten

Arguments = tuple[tuple[str, str, str], ...]
# Where timm has the last norm.
NORMS = ('norm.', 'fc_norm.')
_OF_BOTH: Arguments = (
    (r'^cls_token$', 'class_token=True', 'class_token=False, {pooling}'),
    (r'\.[qk]_norm\.', 'qk_norm=True', 'qk_norm=False'),
)
# Arguments of timm's `VisionTransformer` that decide whether there is such a tensor: with it, and
# without; empty if no argument does.
VIT: Arguments = (
    *_OF_BOTH,
    (r'^reg_token$', 'reg_tokens={reg_tokens}, no_embed_class={no_embed_class}', 'reg_tokens=0'),
    (r'^pos_embed$', "pos_embed='learn'", "pos_embed='none'"),
    (r'^norm_pre\.', 'pre_norm=True', 'pre_norm=False'),
    # timm leaves it to the norm behind it
    (r'^patch_embed\.proj\.bias$', 'pre_norm=False', 'pre_norm=True'),
    # timm takes None for nothing said, and some of its models have a number of their own
    (r'\.ls[12]\.', 'init_values=1e-5', 'init_values=0.0'),
    (r'\.qkv\.bias$', 'qkv_bias=True', 'qkv_bias=False'),
    (r'\.(attn\.proj|fc[12])\.bias$', 'proj_bias=True', 'proj_bias=False'),
)
# The same of timm's `Eva`.
EVA: Arguments = (
    *_OF_BOTH,
    (r'^reg_token$', 'num_reg_tokens={reg_tokens}', 'num_reg_tokens=0'),
    (r'^pos_embed$', 'use_abs_pos_emb=True', 'use_abs_pos_emb=False'),
    # a model of a name that has it has it with every number
    (r'\.gamma_[12]$', 'init_values=1e-5', ''),
    (r'\.q_bias$', 'qkv_bias=True', 'qkv_bias=False'),
)


def pooled_otherwise(expected: StateDict, state: StateDict, arguments: Arguments) -> str:
    """Arguments with which a head would be fed as that of a checkpoint, as far as names tell.

    Args:
        expected: Of the model.
        state: Of the checkpoint.
        arguments: Of the model's class.

    Returns:
        Empty if names do not tell that they differ.
    """
    parts = ('attn_pool.latent', 'norm.weight', 'fc_norm.weight')
    differ = any((name in expected) != (name in state) for name in parts)
    if not differ:
        return ''
    known = _pooling(state, arguments)
    if 'cls_token' not in state or 'attn_pool.latent' in state or known == _no_norm(arguments):
        return known
    # with a class token names tell where the norm is, and not what it is of
    kinds = ("'avg'", "'token'")
    first, second = kinds if kinds[0] in known else reversed(kinds)
    return f'{known} (or {known.replace(first, second)})'


def without_norm(expected: StateDict, fitted: StateDict, arguments: Arguments) -> tuple[str, ...]:
    """A warning of a last norm that a checkpoint lacks, as that of a backbone without one may.

    Args:
        expected: Of the model.
        fitted: Of the checkpoint, by the names of the model.
        arguments: Of the model's class.
    """
    missing = [name for name in expected if name.startswith(NORMS) and name not in fitted]
    if not missing:
        return ()
    return (
        f'the checkpoint has no {shorten(missing)}, so that the last norm is as initialised: '
        f'{_no_norm(arguments)} would fit',
    )


def _pooling(state: StateDict, arguments: Arguments) -> str:
    """Arguments of a model that most likely pools as a checkpoint."""
    if 'attn_pool.latent' in state:
        return "global_pool='map'"
    behind, of_class = 'fc_norm.weight' in state, 'cls_token' in state
    if not behind and 'norm.weight' not in state:
        return _no_norm(arguments) if of_class else f"global_pool='avg', {_no_norm(arguments)}"
    kind = 'token' if of_class and not behind else 'avg'
    # said in any case: some models of timm have another place for their norm than the class
    return f'global_pool={kind!r}, {"use_fc_norm" if arguments is EVA else "fc_norm"}={behind}'


def _no_norm(arguments: Arguments) -> str:
    other = 'use_post_transformer_norm=False, use_fc_norm=False'
    return other if arguments is EVA else 'final_norm=False'


def _of_missing(name: str, other: Iterable[str]) -> bool:
    """Whether a bias is missing only because its whole layer is."""
    return name.endswith('.bias') and f'{name[: -len("bias")]}weight' not in other


def _all_have_positions(state: StateDict) -> bool:
    """Whether a grid is left of the positions if class token and registers have each one too."""
    count = state['pos_embed'].shape[1] if 'pos_embed' in state else 0
    tokens = [state[name].shape[1] for name in ('cls_token', 'reg_token') if name in state]
    return not is_square(count) and is_square(count - sum(tokens))


def only_one_has(
    path: str,
    names: Sequence[str],
    owner: str,
    state: StateDict,
    arguments: Arguments,
    other: Iterable[str],
) -> str:
    """A line about tensors that only one of both has, and arguments with which the model fits.

    Args:
        path: What the checkpoint is called.
        names: Of the tensors.
        owner: Who has them, 'checkpoint' or 'model'.
        state: Of the checkpoint.
        arguments: Of the model's class.
        other: Names of who has them not.
    """
    depth = len({block_of(name) for name in state} - {''})
    reg_tokens = state['reg_token'].shape[1] if 'reg_token' in state else 0
    # of a block that both have, only parts are missing
    if {block_of(name) for name in names} - {block_of(name) for name in other} - {''}:
        hints = [f'depth={depth}']
    else:
        hints = [
            present if owner == 'checkpoint' else absent
            for pattern, present, absent in arguments
            if any(re.search(pattern, name) for name in names if not _of_missing(name, other))
        ]
    values = {
        'reg_tokens': reg_tokens,
        'pooling': _pooling(state, arguments),
        'no_embed_class': not _all_have_positions(state),
    }
    fits = f'; {", ".join(hints)} would fit'.format(**values) if hints and all(hints) else ''
    return (
        f'checkpoint {path!r} does not fit the model: only the {owner} has {shorten(names)}{fits}'
    )
