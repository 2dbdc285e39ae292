import hashlib
from pathlib import Path

import pytest
import torch
from mmengine.logging import HistoryBuffer

from vqmoe_vision.engine.checkpoint import read_state
from vqmoe_vision.engine.publish import publish, publish_checkpoint
from vqmoe_vision.models.compat import STATED
from vqmoe_vision.models.weights import network_of


def write(path: Path) -> str:
    meta = {
        'cfg': 'model = dict()\n',
        STATED: {'img_size': [32, 48]},
        'iter': 2,
        'dataset_meta': {'classes': 'ab'},
    }
    torch.save(
        {
            'state_dict': {'w': torch.ones(2)},
            'meta': {**meta, 'hook_msgs': {'last_ckpt': '/home/me/iter_2.pth'}},
            'message_hub': {'log': HistoryBuffer([1.0], [1])},
            'optimizer': {'state': {0: torch.ones(2)}},
            'param_schedulers': [{'last_step': 2}],
        },
        path,
    )
    return str(path)


def test_weights_config_and_classes_are_kept(tmp_path: Path, capsys) -> None:
    publish([write(tmp_path / 'iter_2.pth'), str(tmp_path / 'out/scenes.pth')])
    (file,) = (tmp_path / 'out').iterdir()
    digits = hashlib.sha256(file.read_bytes()).hexdigest()[:8]
    assert file.name == f'scenes-{digits}.pth'
    assert capsys.readouterr().out == f'wrote {file}\n'
    content = torch.load(file, weights_only=True)
    assert content.keys() == {'state_dict', 'meta'}
    assert content['meta'].keys() == {'cfg', STATED, 'dataset_meta', 'iter'}
    # what starting from it reads
    assert read_state(str(file))['w'].tolist() == [1, 1]
    network = network_of(str(file))
    assert network is not None and network.img_size == (32, 48)
    # nothing that only we allow torch to read
    assert torch.serialization.get_unsafe_globals_in_checkpoint(file) == []


def test_mistakes_are_one_line(tmp_path: Path) -> None:
    good = write(tmp_path / 'iter_2.pth')
    weights, damaged = tmp_path / 'weights.pth', tmp_path / 'damaged.pth'
    torch.save({'w': torch.ones(2)}, weights)
    damaged.write_bytes(b'no checkpoint')
    out = str(tmp_path / 'out.pth')
    for arguments, message in (
        ([str(tmp_path / 'none.pth'), out], r"none\.pth' does not exist"),
        ([str(tmp_path / 'none'), str(tmp_path / 'out')], r"none' does not exist: the work dir"),
        ([good, str(tmp_path / 'out.pt')], r"out\.pt' must end in \.pth"),
        ([str(weights), out], r"weights\.pth' has no 'state_dict' and 'meta' of a training"),
        ([str(damaged), out], r"damaged\.pth' is damaged, or holds more than weights"),
    ):
        with pytest.raises(SystemExit, match=message) as caught:
            publish(arguments)
        assert '\n' not in str(caught.value)
    assert not list(tmp_path.glob('out*'))


def test_a_disk_that_torchs_writer_finds_full_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, out = write(tmp_path / 'iter_2.pth'), tmp_path / 'out.pth'

    def fill(content: dict, path: Path) -> None:
        raise RuntimeError('[enforce fail at inline_container.cc:668] . unexpected pos 64 vs 0')

    monkeypatch.setattr(torch, 'save', fill)
    with pytest.raises(SystemExit) as caught:
        publish([checkpoint, str(out)])
    reason = 'the write was cut off, as by a full disk'
    assert caught.value.code == f'error: {out} could not be written ({reason})'


@pytest.mark.parametrize('error', [OSError(28, 'No space left on device'), KeyboardInterrupt()])
def test_a_write_that_fails_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    checkpoint, out = write(tmp_path / 'iter_2.pth'), tmp_path / 'out'

    def fill(content: dict, path: Path) -> None:
        path.write_bytes(b'a part of it')
        raise error

    monkeypatch.setattr(torch, 'save', fill)
    with pytest.raises(type(error)):
        publish_checkpoint(checkpoint, str(out / 'scenes.pth'))
    assert list(out.iterdir()) == []
