import torch

from vqmoe_vision.analysis.pictures import (
    CELL,
    GAP,
    LIGHTEN,
    expert_colours,
    plot_segmentation,
    rows_of_pictures,
    tint_patches,
)


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


def test_label_maps_are_drawn_in_the_colours_of_the_legend() -> None:
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
    # pixels that are no square stand in the middle of their cell, on white
    wide = rows_of_pictures({'wide': [torch.zeros(1, 2, 8)]}, 't').axes[0].images[0].get_array()
    assert wide[0, CELL // 2].tolist() == [1, 1, 1] and wide[CELL // 2, 0].tolist() == [0, 0, 0]
    (legend,) = figure.legends
    assert [t.get_text() for t in legend.get_texts()] == ['none', 'a', 'b']
    assert [p.get_facecolor()[:3] for p in legend.get_patches()] == [
        tuple(colour) for colour in palette.tolist()
    ]
