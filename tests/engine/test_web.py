"""A model as a page: what its graph answers, and what it shows when it is clicked, offline."""

import copy
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from vqmoe_vision.analysis.record import recorded
from vqmoe_vision.engine.publish import export
from vqmoe_vision.engine.web import SwitchedGraph
from vqmoe_vision.models import export as exporting
from vqmoe_vision.moe import METHODS, moe_layers

from .. import mostly_long, needs_onnx, refused
from ..models.conftest import make, shaken

SMALL = {'img_size': 16, 'patch_size': 4, 'depth': 2, 'moe_layers': [0, 1], 'embed_dim': 16}
PREPARED = {'input_size': (3, 16, 16), 'mean': (0.4, 0.5, 0.6), 'std': (0.2, 0.3, 0.4)}
CLOSE = {'rtol': 0, 'atol': 1e-4}
# all on; one off in the first layer; another in each
SWITCHES = torch.tensor([[[1, 1, 1]] * 2, [[0, 1, 1], [1, 1, 1]], [[1, 0, 1], [1, 1, 0]]]).bool()


def tiny(method: str) -> Any:
    return shaken(make(method, num_experts=3, **SMALL))


def expected(model: Any, image: Tensor, switches: Tensor) -> list[Tensor]:
    """Logits and experts by PyTorch, and by what the analysis records."""
    layers, experts = moe_layers(model), []
    with ExitStack() as stack, torch.no_grad():
        for layer, on in zip(layers.values(), switches, strict=True):
            stack.enter_context(layer.switched(on))
        logits, records = model(image), recorded(model, image)
    for name, on in zip(layers, switches, strict=True):
        record = records[name]
        rows = [(record.experts[part][0], record.weights[part][0]) for part in record.experts]
        if record.combine is not None:
            shares = record.combine[0].sum(dim=-1)  # (N, E)
            rows.append((torch.arange(3).expand(shares.shape), shares))
        for chosen, shares in rows:
            weight, best = (shares * on[chosen]).max(dim=-1, keepdim=True)
            experts.append(torch.where(weight > 0, chosen.gather(1, best), -1)[:, 0].int())
    return [logits, torch.stack(experts)]


@pytest.mark.parametrize('method', mostly_long(METHODS, 'vqmoe'))
def test_a_graph_with_switches_answers_as_pytorch(method, tmp_path):
    needs_onnx()
    model, image = tiny(method), torch.randn(1, 3, 16, 16)
    answers, given = ('logits', 'experts'), {'switches': SWITCHES[0]}
    graph = exporting.Exportable(SwitchedGraph(model), (3, 16, 16), answers, {}, given)
    file = exporting.export_onnx(graph, tmp_path / 'model.onnx', batch=1)
    run = exporting.load_exported(file, threads=1)
    torch.testing.assert_close(run(image, SWITCHES[0])[0], model(image), rtol=0, atol=2e-6)
    for switches in SWITCHES:
        found = run(image, switches)
        torch.testing.assert_close(found, expected(model, image, switches), **CLOSE)


@torch.no_grad()
def test_no_picture_is_of_experts_that_all_tokens_share():
    model = shaken(make('smoe', num_experts=3, preset='shared', **SMALL))
    image = torch.randn(1, 3, 16, 16)
    found = SwitchedGraph(model)(image, SWITCHES[0])[1]
    records = recorded(model, image).values()
    assert found.tolist() == [record.firsts['router'][0].tolist() for record in records]
    # without chosen ones nobody takes a token
    assert SwitchedGraph(model)(image, torch.tensor([[0, 0, 1]] * 2).bool())[1].eq(-1).all()


def test_what_makes_no_page_is_one_line(tmp_path, monkeypatch):
    out = str(tmp_path / 'out')
    says = partial(refused, error=SystemExit)
    (tmp_path / 'there').touch()
    says('^error: --batch=2', export, ['test_vit_vqmoe', out, '--web', '--batch', '2'])
    says('^error: --int8=True', export, ['test_vit_vqmoe', out, '--web', '--int8'])
    says('^error: out=', export, ['test_vit_vqmoe', str(tmp_path), '--web'])
    if shutil.which('npm'):
        says('^error: --web=', export, ['test_vit_dense', out, '--web'])
    monkeypatch.setenv('PATH', str(tmp_path))
    says('needs npm', export, ['test_vit_vqmoe', out, '--web'])
    assert [path.name for path in tmp_path.iterdir()] == ['there']


@pytest.fixture
def served(tmp_path) -> Iterator[tuple[Any, str]]:
    """A model, and where its page is, from a folder that holds all it needs."""
    needs_onnx()
    if shutil.which('npm') is None:
        pytest.skip('needs npm: apt-get install npm')
    model = tiny('smoe')  # of the graph alone the other
    (tmp_path / 'model').mkdir()
    prepared, digits = exporting.preprocessing_of(PREPARED), 'abcdefghij'
    exporting.save(copy.deepcopy(model), tmp_path / 'model', prepared, digits)
    try:
        export([f'local-dir:{tmp_path / "model"}', str(tmp_path / 'page'), '--web'])
    except SystemExit as error:
        if 'npm has to give' not in str(error):
            raise
        pytest.skip('needs the registry of npm, or what it has cached')
    handler = partial(SimpleHTTPRequestHandler, directory=tmp_path / 'page')
    with ThreadingHTTPServer(('127.0.0.1', 0), handler) as server:
        Thread(target=server.serve_forever).start()
        yield model, f'http://127.0.0.1:{server.server_port}/'
        server.shutdown()


@pytest.fixture
def browser() -> Iterator[Any]:
    """One that finds no other machine."""
    playwright = pytest.importorskip('playwright.sync_api', reason='pip install playwright')
    browsers = map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))
    if (path := next(filter(None, browsers), None)) is None:
        pytest.skip('needs a browser: apt-get install chromium')
    alone = '--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1'
    with playwright.sync_playwright() as started:
        found = started.chromium.launch(executable_path=path, args=[alone])
        yield found
        found.close()


ANSWER = """() => Object.fromEntries(Object.entries(answer).map(([name, found]) =>
    [name, Array.from(found.data ?? found)]))"""


def test_the_page_answers_as_pytorch_when_it_is_clicked(served, browser, tmp_path):
    model, url = served
    window, complaints, asked = browser.new_page(), [], []
    window.on('console', lambda message: complaints.append(message.text))
    window.on('pageerror', lambda error: complaints.append(str(error)))
    window.on('request', lambda request: asked.append(request.url))
    window.goto(url)
    window.get_by_text('by danielbuechele').wait_for()
    pixels = np.random.default_rng(0).integers(256, size=(16, 16, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / 'own.png')
    window.locator('input[type=file]').set_input_files(tmp_path / 'own.png')
    window.get_by_text('own.png').wait_for()
    mean, std = (torch.tensor(PREPARED[name]) for name in ('mean', 'std'))
    image = ((torch.from_numpy(pixels) / 255 - mean) / std).permute(2, 0, 1)[None]

    def check(switches: Tensor) -> None:
        answer = window.evaluate(ANSWER)
        found = [torch.tensor(answer[name]).float() for name in ('input', 'logits', 'experts')]
        right = [image, *expected(model, image, switches)]
        torch.testing.assert_close(found, [value.flatten().float() for value in right], **CLOSE)

    def press(layer: int, expert: int, then: bool) -> None:
        section, name = window.locator('section').nth(1 + layer), f'expert {expert}'
        section.get_by_role('checkbox', name=name).click()
        section.get_by_role('checkbox', name=name, checked=then).wait_for()

    check(SWITCHES[0])
    press(0, 1, False)
    press(1, 2, False)
    check(SWITCHES[2])
    said = window.locator('#status').inner_text()
    assert said.startswith('Now ') and 'With all experts on' in said
    press(0, 0, False)
    press(0, 2, True)  # one stays on
    window.get_by_role('button', name='All experts on').click()
    window.locator('#reset:disabled').wait_for()
    check(SWITCHES[0])
    # it would be seen if experts were exchanged
    with torch.no_grad():
        for parameter in moe_layers(model)['blocks.1.mlp'].experts.parameters():
            parameter[:2] = parameter[:2].flip(0)
    with pytest.raises(AssertionError):
        check(SWITCHES[0])
    assert complaints == []
    assert {address.startswith(url) for address in asked} == {True}
