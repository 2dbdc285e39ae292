"""The report in a browser: it opens, and its slider steps by keyboard."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from vqmoe_vision.analysis.report import write_report

from .surveys import NAME, history, soft_survey, survey

playwright = pytest.importorskip(
    'playwright.sync_api', reason='needs playwright: pip install playwright'
)
BROWSERS = ('chromium', 'chromium-browser', 'google-chrome')
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)
pytestmark = pytest.mark.skipif(
    BROWSER is None,
    reason=f'needs a browser, one of {", ".join(BROWSERS)}: apt-get install chromium',
)
LOADED = '[...document.images].map(i => i.complete ? i.naturalWidth : 0)'
VISIBLE = "[...document.querySelector('.stepped').querySelectorAll('figure')].map(f => !f.hidden)"


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Any]:
    """The report alone in a window; what it complains about or fetches is a failure."""
    page = write_report([survey(), soft_survey()], tmp_path, {'run': history()})[0]
    shutil.rmtree(tmp_path / 'pictures')  # the page needs nothing beside it
    complaints: list[str] = []
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=BROWSER)
        window = browser.new_page()
        window.on('console', lambda message: complaints.append(message.text))
        window.on('pageerror', lambda error: complaints.append(str(error)))
        window.on('request', lambda request: complaints.append(request.url[:99]))
        window.goto(page.as_uri())
        yield window
        browser.close()
    assert [c for c in complaints if c != page.as_uri()[:99] and not c.startswith('data:')] == []


def test_the_page_opens_and_its_slider_steps_by_keyboard(opened: Any) -> None:
    widths = opened.evaluate(LOADED)
    assert len(widths) == 19 and min(widths) > 0
    assert opened.evaluate(VISIBLE) == [True] + [False] * 3
    slider = opened.locator('.stepped input').first
    assert slider.get_attribute('aria-valuetext') == f'{NAME}: experts'
    slider.focus()
    opened.keyboard.press('ArrowRight')
    assert opened.evaluate(VISIBLE) == [False, True, False, False]
    assert opened.get_by_text(f'2 of 4: {NAME}: codes').is_visible()
