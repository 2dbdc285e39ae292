"""Files that have all of a model's weights, which timm's `checkpoint_path` loads."""

from __future__ import annotations

import logging

from timm.models import load_checkpoint as load_numpy
from timm.models import load_state_dict
from torch import nn

from .described import describe
from .fitting import strip_names
from .hosts import Transformer
from .origin import origin_of, refuse_other_function
from .refusals import refuse_values
from .state_dicts import StateDict, as_tensors, misfit_of
from .stated_experts import compare_experts, experts_of, experts_of_file
from .weight_files import (
    check_file,
    check_in_one_piece,
    is_of_numpy,
    is_out_of_memory,
    named_source,
)

_logger = logging.getLogger(__name__)


def load_checkpoint(model: nn.Module, path: str) -> None:
    """What timm's `checkpoint_path` is: all of a model's weights, from a file that is checked."""
    if is_of_numpy(path):
        check_file(path)
        try:
            load_numpy(model, path)
        except Exception as error:  # names in the file are those of timm's reader, or are not there
            if type(error) is ValueError or is_out_of_memory(error):
                raise
            said = f'checkpoint {path!r} is damaged, or no file of NumPy that the model reads'
            raise ValueError(said) from error
        return
    state = read_fitting(model, path, f'checkpoint_path={path!r}')
    origin = origin_of(describe(path), path)
    if origin is not None and isinstance(model, Transformer):
        refuse_other_function(model, origin, path)
    stated = experts_of_file(path) if origin is None else experts_of(origin.model)
    for line in compare_experts(model, stated, path):
        _logger.warning('%s: %s', path, line)
    model.load_state_dict(state)


def read_fitting(model: nn.Module, path: str, what: str) -> StateDict:
    """A file of all of a model's weights, which are not loaded."""
    with named_source(path):
        state = load_state_dict(path)
    check_in_one_piece(state, path)
    expected = model.state_dict()
    if isinstance(model, Transformer) and expected.keys().isdisjoint(state):
        state, _ = strip_names(state, expected, path)  # of a run
    state = as_tensors(state, expected, path)
    if problem := misfit_of(model, state):
        raise ValueError(
            f'{what} does not fit the model: {problem}; options of the model, '
            'such as num_classes=10, have to be those of its weights'
        )
    refuse_values(expected, state, path)
    return state
