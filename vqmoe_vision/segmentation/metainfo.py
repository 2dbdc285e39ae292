"""Names and colours of a data set's classes, checked before mmseg takes them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmengine.fileio import list_from_file
from mmseg.datasets import BaseSegDataset

# label maps have 8 bits, and 255 in them is no class
_MOST_CLASSES = 255


def check_metainfo(dataset: type[BaseSegDataset], metainfo: Mapping[str, Any] | None) -> None:
    """Refuses classes and colours that do not fit each other, or the data set."""
    chosen, own = metainfo or {}, dataset.METAINFO
    if 'classes' not in {**own, **chosen}:
        raise ValueError(
            f'{dataset.__name__} needs metainfo=dict(classes=(...)), the names of labels 0, 1, ...'
        )
    classes = _names(chosen['classes']) if 'classes' in chosen else own['classes']
    if 'classes' in own:
        unknown = [name for name in classes if name not in own['classes']]
        if unknown:
            raise ValueError(
                f'metainfo.classes has {unknown[0]!r}, which {dataset.__name__} does not have'
            )
    if 'palette' in chosen:
        # a palette for all classes of a data set may come with some of its classes
        _check_palette(chosen['palette'], {len(classes), len(own.get('classes', classes))})


def complete_metainfo(
    dataset: type[BaseSegDataset], metainfo: Mapping[str, Any] | None
) -> dict[str, Any]:
    """The `metainfo` that a data set of a config has, without loading it."""
    empty = type('Empty', (BaseSegDataset,), {'METAINFO': dataset.METAINFO})
    return empty(metainfo=coloured(dataset, metainfo), lazy_init=True).metainfo


def coloured(
    dataset: type[BaseSegDataset], metainfo: Mapping[str, Any] | None
) -> dict[str, Any] | None:
    """The `metainfo` of a config, checked, with names of a file and colours of chosen classes."""
    check_metainfo(dataset, metainfo)
    chosen, own = dict(metainfo or {}), dataset.METAINFO
    if 'classes' in chosen:  # of a file, or mmseg would read it with its blank lines
        chosen['classes'] = _names(chosen['classes'])
    if 'classes' in chosen and 'palette' not in chosen and {'classes', 'palette'} <= own.keys():
        colours = dict(zip(own['classes'], own['palette'], strict=True))
        chosen['palette'] = [colours[name] for name in chosen['classes']]
    return chosen or None


def _names(classes: Any) -> Sequence[str]:
    if isinstance(classes, str):
        if not Path(classes).is_file():
            raise ValueError(
                f'metainfo.classes={classes!r} must be a sequence of names, such as '
                f'({classes!r},), or a file with one name per line'
            )
        classes = list_from_file(classes)
        while classes and not classes[-1].strip():
            classes.pop()
    if not 1 <= len(classes) <= _MOST_CLASSES:
        raise ValueError(
            f'metainfo.classes has {len(classes)} names; allowed are 1..{_MOST_CLASSES}, '
            'as a label is 8 bits and 255 is ignored'
        )
    if blank := [index for index, name in enumerate(classes) if not str(name).strip()]:
        raise ValueError(f'metainfo.classes has no name for label {blank[0]}')
    twice = [name for name in classes if list(classes).count(name) > 1]
    if twice:
        raise ValueError(f'metainfo.classes has {twice[0]!r} more than once')
    return classes


def _check_palette(palette: Any, lengths: set[int]) -> None:
    if len(palette) not in lengths:
        fitting = ' or '.join(str(length) for length in sorted(lengths))
        raise ValueError(
            f'metainfo.palette has {len(palette)} colours for {fitting} classes; give each class '
            'one, or leave the palette out'
        )
    for index, colour in enumerate(palette):
        numbers = list(colour) if isinstance(colour, Sequence) else []
        if len(numbers) != 3 or not all(isinstance(n, int) and 0 <= n <= 255 for n in numbers):
            raise ValueError(
                f'metainfo.palette[{index}]={colour!r} must be three integers from 0 to 255'
            )
