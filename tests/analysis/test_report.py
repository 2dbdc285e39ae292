"""The report: what stands in it, from surveys made by hand."""

import base64
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image

from vqmoe_vision.analysis.checkpoints import Change
from vqmoe_vision.analysis.report import number_tables, write_report
from vqmoe_vision.analysis.shifts import flip
from vqmoe_vision.analysis.survey import survey as survey_of
from vqmoe_vision.models.normalization import Normalization
from vqmoe_vision.moe import METHODS

from .surveys import NAME, history, soft_survey, survey

CHANGES = [Change('epoch 1', 'epoch 2', {f'{NAME}.router': 0.25})]
VOID = {'meta', 'link', 'img', 'input', 'br'}


class Page(HTMLParser):
    """What a test asks of a page: tags with their attributes, and texts by tag."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self._open: list[str] = []
        self.feed(text)
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.texts.append((self._open[-1], data.strip()))

    def all(self, *tags: str) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.tags if tag in tags]


@pytest.fixture(scope='module')
def written(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The report of two models and a history."""
    out = tmp_path_factory.mktemp('report') / 'new' / 'folder'
    return write_report([survey(), soft_survey()], out, {'run': history()}, CHANGES)


@pytest.fixture(scope='module')
def page(written: list[Path]) -> Page:
    return Page(written[0].read_text())


def test_every_picture_is_in_the_page_and_a_file(written: list[Path], page: Page) -> None:
    files = [path for path in written if path.suffix == '.png']
    prefix = 'data:image/png;base64,'
    shown = [(image['src'] or '').removeprefix(prefix) for image in page.all('img')]
    assert [base64.b64decode(data) for data in shown] == [path.read_bytes() for path in files]
    for path in files:
        with Image.open(path) as picture:
            assert picture.width > 800, path
    # per layer of the first: experts, codes, surest, code map, classes, similarity; one map of
    # loads. Of the second: load, slots, similarity. Three of training.
    assert len(files) == len(set(files)) == 2 * 6 + 1 + 3 + 3


def test_nothing_is_fetched(written: list[Path], page: Page) -> None:
    text = written[0].read_text()
    assert not any(word in text for word in ('http:', 'https:', '@import'))


def test_contents_lead_to_the_sections_and_headings_leave_out_no_level(page: Page) -> None:
    anchors = {a['href'] for a in page.all('a')}
    sections = [h['id'] for h in page.all('h2') if h['id'] != 'contents']
    assert anchors == {f'#{anchor}' for anchor in sections}
    assert sections == [
        'patches', 'load', 'surest', 'codes', 'classes', 'similarity', 'training', 'numbers',
        'shifts', 'changes',
    ]  # fmt: skip
    levels = [int(tag[1]) for tag, _ in page.tags if tag in {'h1', 'h2', 'h3', 'h4'}]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))


def test_names_are_text_and_no_markup(tmp_path: Path) -> None:
    named = survey('<b>x</b> & "y"', layers=1)
    page = Page(write_report([named], tmp_path)[0].read_text())
    assert ('h3', '<b>x</b> & "y"') in page.texts
    assert page.all('b') == []


def test_models_as_they_are(tmp_path: Path) -> None:
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
    page = Page(write_report(surveys, tmp_path)[0].read_text())
    rows = [row for table in number_tables(surveys) for row in table.rows]
    meanings = [tag for _, tag in page.tags if tag.get('class') == 'meaning']
    assert len(rows) > 10 and len(meanings) >= len(rows)
    titles = [text for tag, text in page.texts if tag == 'h3']
    assert all(titles.count(method) >= 4 for method in METHODS)
