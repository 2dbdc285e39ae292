"""The rotation trick: values, gradients by hand and by another library, and its limits."""

import pytest
import torch

from vqmoe_vision.moe.codebooks import rotate_to
from vqmoe_vision.moe.methods.vqmoe import Quantizer, VQMoEConfig

D, SHARE = 8, 0.3


def test_rotation_known_answer() -> None:
    # (2, 0) onto (0, 3): a quarter turn [[0, -1], [1, 0]], stretched by 1.5. Transposed, it takes
    # the gradient (5, 7) to 1.5 (7, -5)
    x = torch.tensor([[2.0, 0.0]], requires_grad=True)
    out = rotate_to(x, torch.tensor([[0.0, 3.0]]))
    assert out.tolist() == [[0.0, 3.0]]
    out.backward(torch.tensor([[5.0, 7.0]]))
    torch.testing.assert_close(x.grad, torch.tensor([[10.5, -7.5]]))


def test_tokens_without_a_rotation() -> None:
    # without a length: straight through. Opposite to the code: the mirror I - 2 x^ x^^T, stretched
    x = torch.zeros(2, D)
    x[1, 0] = 2.0
    x.requires_grad_()
    codes = torch.zeros(2, D)
    codes[:, 0] = -1.0
    out = rotate_to(x, codes)
    assert torch.equal(out, codes)
    gradient = torch.ones(2, D)
    out.backward(gradient)
    mirrored = 0.5 * gradient[1]
    mirrored[0] = -0.5
    torch.testing.assert_close(x.grad, torch.stack([gradient[0], mirrored]))


@pytest.mark.parametrize(
    ('expert_input', 'of_token', 'of_code'),
    [('mix', 1 - SHARE, SHARE), ('ste', 0.0, 1.0), ('official', 1 - 2 * SHARE, SHARE)],
)
def test_every_reading_has_the_values_as_before_and_turns_the_part_of_the_code(
    expert_input: str, of_token: float, of_code: float
) -> None:
    options = {'expert_input': expert_input, 'code_share': SHARE}
    straight, turned = (
        Quantizer(D, VQMoEConfig(rotation_trick=rotation_trick, **options))
        for rotation_trick in (False, True)
    )
    x, code, gradient = torch.randn(5, D, requires_grad=True), torch.randn(5, D), torch.randn(5, D)
    out = turned.expert_input(x, code)
    torch.testing.assert_close(out, straight.expert_input(x, code))
    out.backward(gradient)
    other = x.detach().clone().requires_grad_()
    rotate_to(other, code).backward(gradient)
    torch.testing.assert_close(x.grad, of_token * gradient + of_code * other.grad)
