"""One model that several threads use at a time, as a server does."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from vqmoe_vision.moe import METHODS


@pytest.mark.parametrize('method', METHODS)
def test_a_pass_that_is_overtaken_sees_its_own_images_or_is_refused(
    make_tiny: Callable, method: str
) -> None:
    model = make_tiny(method, depth=2).eval()
    slow_images, images = torch.randn(4, 3, 32, 32), 3 * torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected, expected_slow = model(images), model(slow_images)
    main, begun, overtaken = threading.get_ident(), threading.Event(), threading.Event()

    def wait(*_: object) -> None:
        if threading.get_ident() != main:
            begun.set()
            assert overtaken.wait(60)

    model.blocks[0].register_forward_pre_hook(wait)
    with ThreadPoolExecutor(1) as pool, torch.no_grad():
        slow = pool.submit(torch.no_grad()(model), slow_images)
        assert begun.wait(60)
        answer = model(images)
        overtaken.set()
    torch.testing.assert_close(answer, expected, rtol=0, atol=0)
    if METHODS[method].read_patches is not None:
        with pytest.raises(ValueError, match=r'^thread='):
            slow.result()
    else:
        torch.testing.assert_close(slow.result(), expected_slow, rtol=0, atol=0)
