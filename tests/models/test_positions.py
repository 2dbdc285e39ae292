"""Positions of images that are no square, whose grid a bare file does not say."""

from pathlib import Path
from typing import Any

import pytest
import torch

from vqmoe_vision.engine.checkpoint import start_from

from .conftest import fit_state, make
from .test_weight_files import refused


@pytest.mark.parametrize('way', ['upcycle', 'pretrained', 'fit_state', 'start_from'])
def test_positions_of_an_oblong_model_are_its_own(way: str, tmp_path: Path) -> None:
    sizes = {'img_size': (32, 64)}
    source: Any = make('smoe', **sizes)
    torch.nn.init.normal_(source.pos_embed)
    path = str(tmp_path / 'a.pth')
    torch.save(source.state_dict(), path)
    given: dict[str, Any] = {'upcycle': {'upcycle': path}}.get(way, {})
    if way == 'pretrained':
        given = {'pretrained': True, 'pretrained_cfg_overlay': {'file': path}}
    model: Any = make('smoe', **sizes, **given)
    if way == 'fit_state':
        model.load_state_dict(fit_state(model, source.state_dict(), path)[0])
    if way == 'start_from':
        start_from(model, path)
    assert torch.equal(model.pos_embed, source.pos_embed)


@pytest.mark.parametrize('way', ['upcycle', 'checkpoint'])
def test_what_says_the_grid_of_positions_does(way: str, tmp_path: Path) -> None:
    source: Any = make('smoe', img_size=(32, 64))
    path = str(tmp_path / 'a.pth')
    torch.save(source.state_dict(), path)

    def started(**given: Any) -> Any:
        if way == 'upcycle':
            return make('smoe', upcycle=path, **given)
        model = make('smoe', **given)
        start_from(model, path)
        return model

    message = r'pos_embed is .* pretrained_cfg_overlay=dict\(input_size=\(3, HEIGHT, WIDTH\)\)'
    refused(message, started)
    model = started(pretrained_cfg_overlay=dict(input_size=(3, 32, 64)))
    expected = fit_state(make('smoe'), source.state_dict(), path, [(32, 64)])[0]['pos_embed']
    assert torch.equal(model.pos_embed, expected)
