from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.logging import HistoryBuffer
from mmengine.runner.checkpoint import _load_checkpoint

import vqmoe_vision.engine  # noqa: F401  registers what a log holds


def write(path: Path) -> dict:
    """A checkpoint as a validated run leaves it."""
    hub = {'log': HistoryBuffer([1.0, 3.0], [1, 1]), 'mIoU': np.float32(0.5), 'iter': np.int64(2)}
    torch.save({'state_dict': {'w': torch.ones(2)}, 'message_hub': hub}, path)
    return hub


def test_weights_and_log_are_read_as_data(tmp_path: Path) -> None:
    hub = write(tmp_path / 'a.pth')
    for _ in range(2):  # some mmengine takes its own list back after each checkpoint
        _load_checkpoint(str(tmp_path / 'a.pth'), map_location='cpu')
        read = torch.load(tmp_path / 'a.pth', weights_only=True)
        assert read['state_dict']['w'].tolist() == [1, 1]
        assert read['message_hub']['log'].statistics('mean') == 2  # (1 + 3) / 2
        assert read['message_hub']['mIoU'] == hub['mIoU'] and read['message_hub']['iter'] == 2


class Reaches:
    """Pickled as a call of getattr."""

    def __init__(self, owner: object, name: str) -> None:
        self.call = (owner, name)

    def __reduce__(self) -> tuple:
        return getattr, self.call


@pytest.mark.parametrize(
    ('owner', 'name'),
    [(np.ndarray, 'tofile'), (Reaches(HistoryBuffer, 'mean'), '__globals__')],
)
def test_a_log_reaches_nothing_but_its_own_methods(
    owner: object, name: str, tmp_path: Path
) -> None:
    torch.save({'w': Reaches(owner, name)}, tmp_path / 'a.pth')
    with pytest.raises(Exception, match='is not part of a log'):
        torch.load(tmp_path / 'a.pth', weights_only=True)
