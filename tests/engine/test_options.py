"""`--cfg-options`, also as docs/commands.md writes them."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS

from vqmoe_vision.engine.cli import load_config
from vqmoe_vision.engine.options import flat, parse_options
from vqmoe_vision.engine.trained import scope_of

from .test_cli import DIGITS

DOCUMENT = (Path(__file__).parents[2] / 'docs/commands.md').read_text().replace('\\\n', ' ')
DOCUMENTED = re.findall(r'^python tools/train\.py \$C --cfg-options (.+)$', DOCUMENT, re.M)


@pytest.mark.parametrize(
    ('written', 'value'),
    [
        ("{'layer_decay': 0.8}", {'layer_decay': 0.8}),
        ("{'custom_keys': {'head': {'lr_mult': 2}}}", {'custom_keys': {'head': {'lr_mult': 2}}}),
        ('{}', {}),
        ("[{'type': 'A', 'size': (1, 2)}, 'b']", [{'type': 'A', 'size': (1, 2)}, 'b']),
        # as mmengine reads them
        ('[(1,2),(a,b)]', [(1, 2), ('a', 'b')]),
        ('epoch_{}.pth', 'epoch_{}.pth'),
        ('1,2', [1, 2]),
    ],
)  # fmt: skip
def test_values(written: str, value: Any) -> None:
    assert parse_options([f'a.b={written}']) == {'a.b': value}


@pytest.mark.parametrize('written', ['{a: 2}', "{'a': 1", "[{'a': 1},", '{[]: 1}', '{1, 2}'])
def test_what_is_no_dictionary_is_one_line(written: str) -> None:
    with pytest.raises(ValueError, match=r'--cfg-options .* write a dictionary as in Python'):
        parse_options([f'a.b={written}'])


@pytest.mark.parametrize('element', ['first', '2', '-1'])
def test_what_is_no_element_of_a_list_is_one_line(element: str) -> None:
    name = f'param_scheduler.{element}.end'
    said = rf'^--cfg-options {name}: param_scheduler is a list of 2, .* has no {element!r}$'
    with pytest.raises(ValueError, match=said):
        load_config(str(DIGITS), {name: 1})


@pytest.mark.parametrize('options', DOCUMENTED)
def test_documented_options_are_read_and_make_an_optimizer(options: str) -> None:
    given = parse_options(shlex.split(options, comments=True))
    # nothing is left as text that was meant as more
    assert not [v for v in flat(given).values() if isinstance(v, str) and v[:1] in '{[(']
    config = load_config(str(DIGITS), given)
    with scope_of(config):
        build_optim_wrapper(MODELS.build(config.model), config.optim_wrapper)


def test_many_commands_are_documented() -> None:
    assert len(DOCUMENTED) > 10
