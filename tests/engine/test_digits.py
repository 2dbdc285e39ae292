import numpy as np
import pytest

from vqmoe_vision.engine.digits import digit_scans


def test_splits_are_disjoint_and_together_every_scan() -> None:
    parts = {split: digit_scans(split) for split in ('train', 'dev', 'test')}
    assert [len(scans) for scans, _ in parts.values()] == [1257, 180, 360]
    seen = [{scan.tobytes() for scan in scans} for scans, _ in parts.values()]
    assert not seen[0] & seen[1] | seen[0] & seen[2] | seen[1] & seen[2]
    assert all(np.bincount(digits, minlength=10).min() > 0 for _, digits in parts.values())


def test_scans_use_the_whole_range_of_bytes() -> None:
    scans, _ = digit_scans('test')
    assert scans.shape[1:] == (8, 8) and scans.dtype == np.uint8
    assert (scans.min(), scans.max()) == (0, 255)


def test_unknown_split() -> None:
    with pytest.raises(ValueError, match=r"split='val' must be one of"):
        digit_scans('val')
