"""The report in a browser: it opens, without scripts too, on a phone, in the dark, by keyboard."""

import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from vqmoe_vision.analysis.checkpoints import Change
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


@pytest.fixture(scope='module')
def address(tmp_path_factory: pytest.TempPathFactory) -> str:
    changes = [Change('epoch 1', 'epoch 2', {f'{NAME}.router': 0.25})]
    folder = tmp_path_factory.mktemp('report')
    surveys = [survey(), soft_survey()]
    page = write_report(surveys, folder, {'run': history()}, changes)[0]
    for other in folder.iterdir():  # the page needs nothing beside it
        if other.is_dir():
            shutil.rmtree(other)
    return page.as_uri()


@pytest.fixture(scope='module')
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=BROWSER)
        yield opened
        opened.close()


@pytest.fixture
def visit(browser: Any, address: str) -> Iterator[Callable[..., Any]]:
    """Opens the report in a window of its own; what it complains about or fetches is a failure."""
    complaints: list[str] = []
    windows = []

    def opened(**settings: Any) -> Any:
        windows.append(browser.new_context(**settings))
        page = windows[-1].new_page()
        page.on('console', lambda message: complaints.append(message.text))
        page.on('pageerror', lambda error: complaints.append(str(error)))
        page.on('requestfailed', lambda request: complaints.append(request.url[:99]))
        page.on(
            'request',
            lambda request: (
                request.url == address
                or request.url.startswith('data:')
                or complaints.append(request.url)
            ),
        )
        page.goto(address)
        return page

    yield opened
    for window in windows:
        window.close()
    assert complaints == []


def test_all_pictures_load_and_the_page_does_not_complain(visit: Callable[..., Any]) -> None:
    widths = visit().evaluate(LOADED)
    assert len(widths) == 19 and min(widths) > 800


def test_the_slider_steps_through_the_layers_by_keyboard(visit: Callable[..., Any]) -> None:
    page = visit()
    shown = page.evaluate(VISIBLE)
    assert shown == [True] + [False] * 3
    slider = page.locator('.stepped input').first
    assert slider.get_attribute('aria-valuetext') == f'{NAME}: experts'
    for _ in range(60):  # from the top of the page by Tab alone
        page.keyboard.press('Tab')
        if slider.evaluate('s => s === document.activeElement'):
            break
    page.keyboard.press('ArrowRight')
    assert page.evaluate(VISIBLE) == [False, True, False, False]
    assert slider.get_attribute('aria-valuetext') == f'{NAME}: codes'
    assert page.get_by_text(f'2 of 4: {NAME}: codes').is_visible()
    page.keyboard.press('End')
    assert page.evaluate(VISIBLE) == [False] * 3 + [True]
    assert page.get_by_role('slider', name='4 of 4').count() == 1
