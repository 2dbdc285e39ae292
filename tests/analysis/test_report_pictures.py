"""Pictures and sentences of the report, with known answers."""

import dataclasses

import pytest
import torch
from matplotlib.figure import Figure

from vqmoe_vision.analysis.drawing import listed, percent, spread
from vqmoe_vision.analysis.heat_maps import class_map, load_map, similarity_map
from vqmoe_vision.analysis.patch_pictures import contact_sheet, frames, gate_map, slot_map
from vqmoe_vision.analysis.report_tables import BY_CHANCE, shift_tables
from vqmoe_vision.analysis.routing_curves import curve_pictures
from vqmoe_vision.analysis.sentences import expert_sentence, layer_sentence, over_represented
from vqmoe_vision.analysis.surveyed import Survey

from .surveys import CLASSES, CODEBOOK, NAME, ROUTER, history, layer_survey, soft_survey, survey


def plain(text: str) -> str:
    return text.replace('\xa0', ' ')


def written(figure: Figure) -> list[str]:
    return [text.get_text() for axes in figure.axes for text in axes.texts]


@pytest.mark.parametrize(
    ('share', 'expected'),
    [(0, '0 %'), (0.0004, 'under 0.1 %'), (0.004, '0.4 %'), (0.144, '14 %'), (1, '100 %')],
)
def test_shares_in_words(share: float, expected: str) -> None:
    assert plain(percent(share)) == expected


def test_lists_in_words() -> None:
    assert [listed(list(s)) for s in ('', 'a', 'ab', 'abc')] == ['', 'a', 'a and b', 'a, b and c']


def test_loads_in_words() -> None:
    uneven = torch.tensor([0.1, 0.7, 0.2])
    assert plain(spread(uneven, 'expert')) == 'expert 1 takes most, 70 %, expert 0 least, 10 %'
    assert plain(spread(torch.full((4,), 0.25), 'code')) == 'all 4 codes take 25 %'
    assert plain(layer_sentence(layer_survey())) == (
        'With 4 experts an even load is 25 %. '
        'By router: expert 0 takes most, 50 %, expert 3 least, 0 %; 1 took none of these tokens. '
        'By quantizer.codebook: all 4 experts take 25 %; none is dead.'
    )


def test_over_represented_by_hand() -> None:
    # of all 400 tokens a fifth, two fifths and two fifths; of expert 0's 100, 0.5, 0.3 and 0.2
    counts = torch.tensor([[50, 30, 20], [30, 130, 140]])
    assert over_represented(counts, 0) == [(0, pytest.approx(2.5))]
    # 30, 130 and 140 of 300: 0.5, 1.08 and 1.17 times, all below 1.25
    assert over_represented(counts, 1) == []
    # twice as frequent, but of 19 tokens nothing is said
    assert over_represented(torch.tensor([[19, 0], [0, 19]]), 0) == []
    assert over_represented(torch.tensor([[20, 0], [0, 20]]), 0) == [(0, pytest.approx(2))]
    assert over_represented(torch.zeros(2, 3), 0) == []


def test_an_expert_that_nothing_reaches_is_dead() -> None:
    layer = dataclasses.replace(layer_survey(), load={ROUTER: torch.tensor([0.5, 0.3, 0.2, 0])})
    assert expert_sentence(layer, 3, CLASSES) == 'takes no token: it is dead.'


def test_loads_of_layers_with_different_numbers_of_experts() -> None:
    first, second = layer_survey(), layer_survey()
    second = dataclasses.replace(second, num_experts=2, load={ROUTER: torch.tensor([0.25, 0.75])})
    picture = load_map(Survey('x', 1, None, {NAME: first, 'blocks.3.mlp': second}, [], {}))
    assert picture is not None
    axes = picture.figure.axes[0]
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert names == ['blocks.1.router', 'blocks.1.codebook', 'blocks.3.router']
    assert written(picture.figure) == ['50', '30', '20', '0', *['25'] * 4, '25', '75']
    assert 'blocks.3.router: expert 1 takes most, 75 %' in plain(picture.alt)


def test_a_row_of_the_class_map_sums_to_a_hundred() -> None:
    layer = layer_survey()
    counts = layer.expert_by_class[ROUTER]
    picture = class_map(NAME, ROUTER, counts, layer.load[ROUTER], CLASSES)
    (image,) = picture.figure.axes[0].get_images()
    drawn = torch.as_tensor(image.get_array())
    # the 200 dogs: 50 to expert 0, 100 to expert 1, 50 to expert 2
    assert drawn[1].tolist() == pytest.approx([25, 50, 25, 0])
    assert drawn.sum(1).tolist() == pytest.approx([100] * 3)
    assert 'dog to expert 1 (50 %)' in plain(picture.alt)


def test_of_many_classes_those_are_shown_that_differ_most() -> None:
    counts = torch.full((2, 150), 10)
    counts[0, 149], counts[1, 149], counts[:, 7] = 20, 0, 0  # no token is of class 7
    classes = [f'class {i}' for i in range(150)]
    picture = class_map(NAME, ROUTER, counts, torch.tensor([0.5, 0.5]), classes)
    names = [label.get_text() for label in picture.figure.axes[0].get_yticklabels()]
    assert len(names) == 30 and names[-1] == 'class 149' and 'class 7' not in names
    assert '(30 that differ most)' in picture.figure.axes[0].get_title()


def test_similarity_names_the_pair_that_is_most_alike() -> None:
    picture = similarity_map(NAME, layer_survey())
    # 0.75 in two of twelve places
    expected = 'experts 0 and 1 are most alike, 0.75, the mean over pairs is 0.12'
    assert picture is not None
    assert picture.alt == f'Cosine of weights: {expected}; of outputs: {expected}.'
    single = dataclasses.replace(layer_survey(), similarity={'weights': torch.ones(1, 1)})
    alone = similarity_map(NAME, single)
    assert alone is not None and alone.alt == 'Cosine of weights: a single expert.'
    assert similarity_map(NAME, dataclasses.replace(single, similarity={})) is None


def test_small_negative_similarity_is_no_negative_zero() -> None:
    cosine = torch.eye(2) - 0.001
    picture = similarity_map(NAME, dataclasses.replace(layer_survey(), similarity={'w': cosine}))
    assert picture is not None and written(picture.figure) == ['1.00', '0.00', '0.00', '1.00']


def test_frames_go_through_the_layers_in_order() -> None:
    drawn = list(frames(survey()))
    kinds = [(f'{ROUTER}', 'experts'), (f'{CODEBOOK}', 'experts'), (f'{CODEBOOK}', 'codes')]
    layers = [NAME, 'blocks.3.mlp']
    assert [p.title for p in drawn] == [f'{n}.{d}: {k}' for n in layers for d, k in kinds]
    # columns 0 to 5 modulo 4: experts 0 and 1 have two columns of six
    assert plain(drawn[0].alt).endswith(
        '4 of 4 experts occur, most often expert 0 33 %, expert 1 33 % and expert 2 17 %.'
    )
    assert list(frames(dataclasses.replace(survey(), examples=[]))) == []


def test_a_layer_whose_name_begins_like_another_has_its_own_frames() -> None:
    seen = survey(layers=6)  # blocks.1 and blocks.11
    titles = [picture.title for picture in frames(seen)]
    assert len(titles) == len(set(titles)) == 6 * 3


def test_patches_that_no_expert_takes_have_their_entry() -> None:
    seen = survey(layers=1)
    seen.examples[0].experts[f'{NAME}.{ROUTER}'][0] = -1
    first = next(frames(seen))
    (legend,) = first.figure.legends
    assert [text.get_text() for text in legend.get_texts()][-1] == 'no expert'


def test_surest_patches_in_words() -> None:
    picture = contact_sheet(NAME, ROUTER, layer_survey())
    assert 'Expert 0: 5 from 5 images, weights 0.90 to 0.50.' in picture.alt
    assert picture.alt.endswith('Expert 3: none.')
    assert written(picture.figure).count('0.90') == 3


def test_gates_in_words() -> None:
    seen = survey(layers=1)
    for at, example in enumerate(seen.examples):
        example.gates[NAME][:] = 0.25 + 0.5 * at
    assert gate_map(NAME, seen.examples).alt == (
        'Of the patches of 2 pictures the middle share is 0.50; eight of ten lie between 0.25 and '
        '0.75.'
    )


def test_slots_in_words() -> None:
    seen = soft_survey().examples
    slots = seen[0].slots[NAME]
    slots[:] = 0
    slots[:, 0, 0], slots[:, 0, 1] = 3, 1  # three quarters on one patch
    assert '0.png: 75 % to 75 %' in plain(slot_map(NAME, seen).alt)


def test_curves_hold_the_history() -> None:
    lines = history(3)
    load, codes, change = curve_pictures(lines)
    first = load.figure.axes[0].get_lines()[0]
    assert first.get_xdata().tolist() == [10, 20, 30]
    shares = [line['layers'][NAME]['load'][0] for line in lines]
    assert first.get_ydata().tolist() == pytest.approx(shares)
    assert len(codes.figure.axes[0].get_lines()) == 8
    moved = {line.get_label(): line.get_ydata().tolist() for line in change.figure.axes[0].lines}
    assert moved['router'] == pytest.approx([0.1, 0.05, 0.1 / 3])
    assert 'frozen' not in moved  # zero has no place on a logarithmic axis
    assert 'router from 0.1 to 0.033' in change.alt
    assert curve_pictures([]) == []
    assert curve_pictures([{'iteration': 1, 'layers': {}}]) == []


def test_no_layer_leaves_the_picture_that_all_share() -> None:
    lines = history(3)
    for line in lines:  # the second layer has collapsed
        other = line['layers']['blocks.3.mlp'] = dict(line['layers'][NAME])
        other['load'] = [0.97, 0.01, 0.01, 0.01]
    load = curve_pictures(lines)[0]
    for axes in load.figure.axes:
        assert axes.get_ylim()[0] == 0 and axes.get_ylim()[1] > 0.97
    assert 'and was 97 % at 10' in plain(load.alt)


def test_shifts_stand_beside_chance() -> None:
    seen = survey(layers=1)
    seen.layers[NAME].numbers[f'{ROUTER}/changed_by_chance'] = 0.62
    table, kept = shift_tables([seen, soft_survey()])
    # 1 - 0.12 / 0.62, rounded
    assert [(row.name, row.cells[0][:4]) for row in kept.rows] == [
        ('gaussian_noise 3', '0.80'),
        ('flip', '0.80'),
    ]
    assert table.heads == [f'{NAME}.{ROUTER}']
    assert [(row.name, plain(row.cells[0])) for row in table.rows] == [
        (BY_CHANCE, '62 %'),
        ('gaussian_noise 3', '12 %'),
        ('flip', '12 %'),
    ]
