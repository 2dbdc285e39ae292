import hashlib
from pathlib import Path

import pytest
import torch
from mmengine.logging import HistoryBuffer

from vqmoe_vision.engine.checkpoint import read_state
from vqmoe_vision.engine.publish import publish
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
    good, weights, damaged = write(tmp_path / 'iter_2.pth'), tmp_path / 'w.pth', tmp_path / 'd.pth'
    torch.save({'w': torch.ones(2)}, weights)
    damaged.write_bytes(b'no checkpoint')
    out = str(tmp_path / 'out.pth')
    for arguments, message in (
        ([str(tmp_path / 'none.pth'), out], '^error: source='),
        ([good, str(tmp_path / 'out.pt')], '^error: out='),
        ([str(tmp_path), out], '^error: out='),
        ([good, out, '--license', 'mit'], "^error: --license='mit'"),
        ([str(weights), out], '^error: checkpoint='),
        ([str(damaged), out], r"d\.pth' is damaged"),
    ):
        with pytest.raises(SystemExit, match=message) as caught:
            publish(arguments)
        assert '\n' not in str(caught.value)
    assert not list(tmp_path.glob('out*'))
