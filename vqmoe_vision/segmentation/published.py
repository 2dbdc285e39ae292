"""Released Segmenters of mmsegmentation and of rstrudel/segmenter, in the names of ours."""

from vqmoe_vision.models.compat import StateDict, part_of
from vqmoe_vision.models.fitting import from_mmseg, is_of_mmseg, replaced

_THEIRS, _OURS = 'backbone.', 'backbone.model.'
_DECODER = (
    (r'^decoder\.proj_dec\.', 'decode_head.dec_proj.'),
    (r'^decoder\.proj_(patch|classes)$', r'decode_head.\1_proj.weight'),
    (r'^decoder\.head\.', 'decode_head.conv_seg.'),
    (r'^decoder\.blocks\.', 'decode_head.layers.'),
    (r'^decoder\.', 'decode_head.'),
    (r'\.norm([12])\.', r'.ln\1.'),
    (r'\.attn\.qkv\.', '.attn.attn.in_proj_'),
    (r'\.attn\.proj\.', '.attn.attn.out_proj.'),
    (r'\.mlp\.fc1\.', '.ffn.layers.0.0.'),
    (r'\.mlp\.fc2\.', '.ffn.layers.1.'),
)


def in_our_names(state: StateDict) -> tuple[StateDict, str]:
    """The state of a segmentor as ours is called, and a line about it; our own stays as it is."""
    backbone = part_of(state, _THEIRS)
    if is_of_mmseg(backbone):
        renamed = {_OURS + name: value for name, value in from_mmseg(backbone).items()}
        others = {name: value for name, value in state.items() if not name.startswith(_THEIRS)}
        stem = 'patch_embed.projection.bias'
        bias = '' if stem in backbone else '; the stem has no bias there, and one of zeros here'
        return {**renamed, **others}, f'the names are those of mmseg, {len(state)} tensors{bias}'
    encoder = part_of(state, 'encoder.')
    if 'patch_embed.proj.weight' in encoder:
        network = {k: v for k, v in encoder.items() if not k.startswith('head.')}
        renamed = {_OURS + name: value for name, value in network.items()}
        others = {name: value for name, value in state.items() if not name.startswith('encoder.')}
        note = (
            f'the names are those of rstrudel/segmenter, {len(state)} tensors; '
            f"left out is the encoder's own head, {len(encoder) - len(network)} of them"
        )
        return {**renamed, **_decoder(others)}, note
    return state, ''


def _decoder(state: StateDict) -> StateDict:
    """Names of mmseg's head, whose projections are linear layers and linear head a convolution."""
    renamed = {}
    for name, value in state.items():
        if name in ('decoder.proj_patch', 'decoder.proj_classes'):
            value = value.t()
        elif name == 'decoder.head.weight':
            value = value[:, :, None, None]
        renamed[replaced(name, _DECODER)] = value
    return renamed
