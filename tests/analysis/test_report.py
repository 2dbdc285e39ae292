"""The report: what stands in it, from surveys made by hand."""

import base64
import io
import re
import shutil
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
import timm
import torch
from PIL import Image

from vqmoe_vision.analysis.report import number_tables, write_report
from vqmoe_vision.analysis.shifts import Change, flip
from vqmoe_vision.analysis.survey import survey as survey_of
from vqmoe_vision.models.normalization import Normalization
from vqmoe_vision.moe import METHODS

from .surveys import NAME, history, soft_survey, survey

CHANGES = [Change('epoch 1', 'epoch 2', {f'{NAME}.router': 0.25})]


@pytest.fixture(scope='module')
def page(tmp_path_factory) -> str:
    out = tmp_path_factory.mktemp('report') / 'new' / 'folder'
    files = write_report([survey(), soft_survey()], out, {'run': history()}, CHANGES)
    assert [file.name for file in files] == ['report.html', 'numbers.json']
    return files[0].read_text()


def test_every_picture_is_in_the_page_and_nothing_is_fetched(page):
    pictures = re.findall('src="data:image/png;base64,([^"]*)"', page)
    for data in pictures:
        with Image.open(io.BytesIO(base64.b64decode(data))) as picture:
            assert picture.width > 800
    # per layer of the first: experts, codes, surest, code map, classes, similarity; one map of
    # loads. Of the second: load, slots, similarity. Three of training.
    assert len(pictures) == 2 * 6 + 1 + 3 + 3
    assert not any(word in page for word in ('http:', 'https:', '@import'))


def test_contents_lead_to_the_sections_and_headings_leave_out_no_level(page):
    sections = re.findall('<h2 id="([^"]*)"', page)[1:]
    assert {*re.findall('<a [^>]*href="#([^"]*)"', page)} == {*sections}
    assert sections == [
        'patches', 'load', 'surest', 'codes', 'classes', 'similarity', 'training', 'numbers',
        'shifts', 'changes',
    ]  # fmt: skip
    levels = [int(level) for level in re.findall(r'<h(\d)', page)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))


def test_names_are_text_and_no_markup(tmp_path):
    page = write_report([survey('<b>x</b> & "y"', layers=1)], tmp_path)[0].read_text()
    assert '<h3>&lt;b&gt;x&lt;/b&gt; &amp; &#34;y&#34;</h3>' in page and '<b>' not in page


def test_models_as_they_are(tmp_path):
    """Of every method, untrained: whatever a survey holds has a place, and numbers a meaning."""
    normalization = Normalization(mean=(0.5,) * 3, std=(0.5,) * 3)
    surveys = []
    for method in METHODS:
        model = timm.create_model(
            f'vit_tiny_{method}',
            img_size=16, patch_size=4, embed_dim=12, depth=2, num_heads=3, num_classes=2,
        )  # fmt: skip
        batches = [(torch.randn(2, 3, 16, 16), torch.tensor([0, 1]))]
        seen = survey_of(
            model, batches, title=method, normalization=normalization, classes=['a', 'b'],
            shifts=[flip()],
        )  # fmt: skip
        surveys.append(seen)
    page = write_report(surveys, tmp_path)[0].read_text()
    rows = [row for table in number_tables(surveys) for row in table.rows]
    assert 10 < len(rows) <= page.count('class="meaning"')
    assert all(page.count(f'<h3>{method}</h3>') >= 4 for method in METHODS)


LOADED = '[...document.images].map(i => i.complete ? i.naturalWidth : 0)'
VISIBLE = "[...document.querySelector('.stepped').querySelectorAll('figure')].map(f => !f.hidden)"


@pytest.fixture
def opened(tmp_path) -> Iterator[Any]:
    """The report alone in a window; what it complains about or fetches is a failure."""
    playwright = pytest.importorskip('playwright.sync_api', reason='pip install playwright')
    browsers = map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))
    if (path := next(filter(None, browsers), None)) is None:
        pytest.skip('needs a browser: apt-get install chromium')
    page = write_report([survey(), soft_survey()], tmp_path, {'run': history()})[0]
    complaints: list[str] = []
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=path)
        window = browser.new_page()
        window.on('console', lambda message: complaints.append(message.text))
        window.on('pageerror', lambda error: complaints.append(str(error)))
        window.on('request', lambda request: complaints.append(request.url[:99]))
        window.goto(page.as_uri())
        yield window
        browser.close()
    assert [c for c in complaints if c != page.as_uri()[:99] and not c.startswith('data:')] == []


def test_the_page_opens_and_its_slider_steps_by_keyboard(opened):
    widths = opened.evaluate(LOADED)
    assert len(widths) == 19 and min(widths) > 0
    assert opened.evaluate(VISIBLE) == [True] + [False] * 3
    slider = opened.locator('.stepped input').first
    assert slider.get_attribute('aria-valuetext') == f'{NAME}: experts'
    slider.focus()
    opened.keyboard.press('ArrowRight')
    assert opened.evaluate(VISIBLE) == [False, True, False, False]
    assert opened.get_by_text(f'2 of 4: {NAME}: codes').is_visible()
