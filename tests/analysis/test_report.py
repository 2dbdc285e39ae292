"""The report: what stands in it, from surveys made by hand."""

import base64
import dataclasses
import io
import re
from itertools import pairwise

import pytest
import torch
from matplotlib.colors import to_hex
from PIL import Image

from vqmoe_vision.analysis import figures
from vqmoe_vision.analysis.overview import overview
from vqmoe_vision.analysis.pictures import CELL, GAP, expert_colours, plot_segmentation
from vqmoe_vision.analysis.report import number_tables, shift_tables, write_report
from vqmoe_vision.analysis.shifts import Change, flip
from vqmoe_vision.analysis.survey import Survey
from vqmoe_vision.analysis.survey import survey as survey_of
from vqmoe_vision.analysis.tally import Codes
from vqmoe_vision.models.normalization import Normalization
from vqmoe_vision.moe import METHODS

from .. import full_disk
from .conftest import make
from .surveys import CODEBOOK, EXPERTS, NAME, ROUTER, history, layer_survey, soft_survey, survey


@pytest.fixture(scope='module')
def page(tmp_path_factory) -> str:
    out = tmp_path_factory.mktemp('report') / 'new' / 'folder'
    changes = [Change('epoch 1', 'epoch 2', {f'{NAME}.router': 0.25})]
    files = write_report([survey(), soft_survey()], out, {'run': history()}, changes)
    assert [file.name for file in files] == ['report.html', 'numbers.json']
    return files[0].read_text()


def test_every_picture_is_in_the_page_and_nothing_is_fetched(page):
    pictures = re.findall('"picture"><img src="data:image/webp;base64,([^"]*)"', page)
    for data in pictures:
        with Image.open(io.BytesIO(base64.b64decode(data))) as picture:
            assert picture.width > 800
    # of each layer of the first three, of the second its similarity, and three of training
    assert len(pictures) == 2 * 3 + 1 + 3
    assert not any(word in page for word in ('http:', 'https:', '@import'))


def test_contents_lead_to_the_sections_and_headings_leave_out_no_level(page):
    sections = re.findall('<h2 id="([^"]*)"', page)[1:]
    assert {*re.findall('<a [^>]*href="#([^"]*)"', page)} == {*sections}
    assert ' '.join(sections) == 'codes classes similarity training numbers shifts changes'
    levels = [int(level) for level in re.findall(r'<h(\d)', page)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))


def test_names_are_text_and_no_markup(tmp_path):
    page = write_report([survey('<b>x</b> & "y"', layers=1)], tmp_path)[0].read_text()
    assert '<h3>&lt;b&gt;x&lt;/b&gt; &amp; &#34;y&#34;</h3>' in page and '<b>' not in page


def test_on_a_full_disk_the_earlier_report_stays(tmp_path):
    files = write_report([survey(layers=1)], tmp_path)
    earlier_bytes = [file.read_bytes() for file in files]
    with full_disk(5000), pytest.raises(OSError, match=r'report\.html'):
        write_report([survey(layers=1)], tmp_path)
    assert [file.read_bytes() for file in files] == earlier_bytes
    assert len([*tmp_path.iterdir()]) == 2


@pytest.mark.usefixtures('unpainted')
def test_models_as_they_are(tmp_path):
    """Of every method, untrained: whatever a survey holds has a place, and numbers a meaning."""
    batch, given = (torch.rand(2, 3, 32, 32), torch.tensor([0, 1])), {'classes': ['a', 'b']}
    given |= {'normalization': Normalization((0.5,) * 3, (0.5,) * 3), 'shifts': [flip()]}
    surveys = [survey_of(make(method), [batch], title=method, **given) for method in METHODS]
    page = write_report(surveys, tmp_path)[0].read_text()
    rows = [row for table in number_tables(surveys) for row in table.rows]
    assert 10 < len(rows) <= page.count('class="meaning"')
    assert all(page.count(f'<h3>{method}</h3>') >= 2 for method in METHODS)


def plain(text: str) -> str:
    return text.replace('\xa0', ' ')


def test_loads_of_layers_with_different_numbers_of_experts():
    first, second = layer_survey(), layer_survey()
    second = dataclasses.replace(
        second, num_experts=2, load={ROUTER: torch.tensor([0.25, 0.75])}, confident={}
    )
    loads = overview(Survey('x', 1, None, {NAME: first, 'blocks.3.mlp': second}, [], {}))['loads']
    shares = {name: [round(share) for share, _ in parts] for name, parts in loads.items()}
    expected = {'1.router': [50, 30, 20, 0], '1.codebook': [25] * 4, '3.router': [25, 75]}
    assert shares == {f'blocks.{name}': share for name, share in expected.items()}
    red = loads['blocks.1.router'][3][1]  # as the legend of every picture has it
    assert red == to_hex(expert_colours(EXPERTS)[3].tolist())


def test_a_row_of_the_class_map_sums_to_a_hundred():
    (picture, _) = figures.class_maps(survey())
    (image,) = picture.figure.axes[0].get_images()
    drawn = torch.as_tensor(image.get_array())
    # the 200 dogs: 50 to expert 0, 100 to expert 1, 50 to expert 2; all 200 cats go to expert 0
    assert drawn[1].tolist() == pytest.approx([25, 50, 25, 0])
    assert drawn.sum(1).tolist() == pytest.approx([100] * 3)
    assert plain(picture.alt) == 'Most together: 100 % of the tokens of cat go to expert 0.'


def test_a_patch_has_the_colour_of_its_expert_in_the_load():
    seen = survey(layers=1)
    for example in seen.examples:
        example.image[:] = 0
        example.maps[NAME][ROUTER][:] = 2
        example.maps[NAME][CODEBOOK][:] = -1
    found = overview(seen)
    for row, expected in ((0, found['loads']['blocks.1.router'][2][1]), (1, '#333333')):
        for uri, _ in found['lines'][0]['strips'][row][1]:
            with Image.open(io.BytesIO(base64.b64decode(uri.partition(',')[2]))) as picture:
                ((_, colour),) = picture.convert('RGB').getcolors()
                assert colour == tuple(bytes.fromhex(expected[1:]))


def test_axes_of_the_map_by_hand():
    # around their mean the tokens are (+-3, 0, 0) and (0, +-1, 0): variances 18 and 2 of 20
    tokens = torch.tensor([[3.0, 0, 0], [-3, 0, 0], [0, 1, 0], [0, -1, 0]]) + 5
    codes = Codes(tokens[:2], torch.tensor([0.5, 0.5]), tokens, torch.tensor([0, 1, 0, 1]))
    layer = dataclasses.replace(layer_survey(), codebook=codes, num_experts=2)
    (picture,) = figures.code_maps(Survey('x', 1, None, {NAME: layer}, [], {}))
    axes = picture.figure.axes[0]
    assert plain(axes.get_xlabel()) == 'first component, 90 % of the variance'
    assert plain(axes.get_ylabel()) == 'second component, 10 %'
    placed = axes.collections[1].get_offsets()
    assert abs(placed[:, 0]).tolist() == pytest.approx([3, 3])
    assert placed[:, 1].tolist() == pytest.approx([0, 0])
    colours = torch.as_tensor(axes.collections[1].get_facecolors()[:, :3])
    torch.testing.assert_close(colours.float(), expert_colours(2))


def test_curves_hold_the_history():
    lines = history(3)
    load, codes, change = figures.training_curves(lines)
    first = load.figure.axes[0].get_lines()[0]
    assert first.get_xdata().tolist() == [10, 20, 30]
    shares = [line['layers'][NAME]['load'][0] for line in lines]
    assert first.get_ydata().tolist() == pytest.approx(shares)
    assert len(codes.figure.axes[0].get_lines()) == 8
    moved = {line.get_label(): line.get_ydata().tolist() for line in change.figure.axes[0].lines}
    assert moved['router'] == pytest.approx([0.1, 0.05, 0.1 / 3])
    assert all(value != value for value in moved['frozen'])  # no place on an axis of logarithms
    assert figures.training_curves([]) == []


def test_shifts_stand_beside_chance():
    seen = survey(layers=1)
    seen.layers[NAME].numbers[f'{ROUTER}/changed_by_chance'] = 0.62
    table, kept = shift_tables([seen, soft_survey()])
    # 1 - 0.125 / 0.62, rounded
    assert kept.rows == [('gaussian_noise 3', ['0.80']), ('flip', ['0.80'])]
    assert table.heads == [f'{NAME}.{ROUTER}']
    shown = [(name, plain(cells[0])) for name, cells in table.rows]
    assert shown == [('by chance', '62 %'), ('gaussian_noise 3', '12 %'), ('flip', '12 %')]


def test_a_dollar_in_the_name_of_a_class_is_a_letter():
    # as mathematics the second is an error
    names = ['$a_b', r'$\frac$', 'tree']
    labels = {'labels': torch.zeros(1, 2, 2, dtype=torch.long)}
    figure = plot_segmentation(torch.rand(1, 3, 2, 2), labels, names, torch.eye(3), 't')
    picture = figures.class_maps(dataclasses.replace(survey(), classes=names))[0].figure
    ticks = picture.axes[0].get_yticklabels()
    for drawn, texts in ((figure, figure.legends[0].get_texts()), (picture, ticks)):
        drawn.draw_without_rendering()
        assert {text.get_text() for text in texts} == set(names)


def test_label_maps_are_drawn_in_the_colours_of_the_legend():
    palette = torch.tensor([[0.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    labels = torch.tensor([[[0, 1], [2, 0]], [[1, 1], [1, 1]]])
    rows = {'labels': labels, 'predictions': torch.zeros_like(labels)}
    figure = plot_segmentation(torch.rand(2, 3, 2, 2), rows, ('none', 'a', 'b'), palette, 't')
    names = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert names == ['image', 'labels', 'predictions']
    # the first label map, a pixel of each quarter
    corner = figure.axes[0].images[0].get_array()[CELL + GAP :, :CELL]
    quarters = corner[CELL // 4 : CELL : CELL // 2, CELL // 4 :: CELL // 2]
    assert quarters.tolist() == [[[0, 0, 0], [1, 0, 0]], [[0, 1, 0], [0, 0, 0]]]

    shown = [patch.get_facecolor()[:3] for patch in figure.legends[0].get_patches()]
    assert shown == [*map(tuple, palette.tolist())]
