"""Where a number comes from."""

from pathlib import Path

import pytest

from vqmoe_vision import provenance
from vqmoe_vision.provenance import commit, installed


def test_absent_packages_have_no_version() -> None:
    assert installed('torch') is not None
    assert installed('no-such-package-anywhere') is None


def test_the_commit_is_that_of_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provenance, '__file__', str(tmp_path / 'provenance.py'))
    assert commit() is None  # there is no checkout
