import pytest
import torch

from vqmoe_vision.analysis.pictures import (
    LIGHTEN,
    expert_colours,
    plot_experts,
    plot_segmentation,
    tint_patches,
)


@pytest.mark.parametrize('num_experts', [1, 8, 16, 64])
def test_every_expert_has_a_colour_of_its_own(num_experts: int) -> None:
    colours = expert_colours(num_experts)
    assert colours.shape == (num_experts, 3)
    assert len(colours.unique(dim=0)) == num_experts


def test_patch_takes_the_colour_of_its_expert() -> None:
    images = torch.zeros(1, 1, 4, 6)
    images[..., 3, 5] = 1.0
    experts = torch.tensor([[[0, 1, 2], [3, 4, 5]]])
    tinted = tint_patches(images, experts, num_experts=8)
    colours = expert_colours(8)
    assert tinted.shape == (1, 3, 4, 6)
    for row in range(4):
        for column in range(6):
            expected = colours[experts[0, row // 2, column // 2]]
            if (row, column) == (3, 5):  # the one bright pixel
                expected = expected + LIGHTEN * (1 - expected)
            torch.testing.assert_close(tinted[0, :, row, column], expected)


def test_picture_has_a_row_per_layer_and_a_legend_entry_per_expert() -> None:
    experts = {name: torch.zeros(3, 2, 2, dtype=torch.long) for name in ('blocks.1', 'blocks.3')}
    figure = plot_experts(torch.rand(3, 1, 4, 4), experts, num_experts=5, title='t')
    assert len(figure.axes) == 3 * 3  # (image, two layers) x three images
    assert [axes.get_ylabel() for axes in figure.axes[::3]] == ['image', 'blocks.1', 'blocks.3']
    (legend,) = figure.legends
    assert [t.get_text() for t in legend.get_texts()] == [f'expert {i}' for i in range(5)]


def test_label_maps_are_drawn_in_the_colours_of_the_legend() -> None:
    palette = torch.tensor([[0.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    labels = torch.tensor([[[0, 1], [2, 0]], [[1, 1], [1, 1]]])
    rows = {'labels': labels, 'predictions': torch.zeros_like(labels)}
    figure = plot_segmentation(torch.rand(2, 3, 2, 2), rows, ('none', 'a', 'b'), palette, 't')
    assert [axes.get_ylabel() for axes in figure.axes[::2]] == ['image', 'labels', 'predictions']
    drawn = figure.axes[2].images[0].get_array()
    assert drawn.tolist() == [[[0, 0, 0], [1, 0, 0]], [[0, 1, 0], [0, 0, 0]]]
    (legend,) = figure.legends
    assert [t.get_text() for t in legend.get_texts()] == ['none', 'a', 'b']
    assert [p.get_facecolor()[:3] for p in legend.get_patches()] == [
        tuple(colour) for colour in palette.tolist()
    ]
