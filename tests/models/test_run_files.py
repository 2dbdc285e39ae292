"""Checkpoints of runs without mmengine, and errors beside the reading of weights."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mmengine.logging import HistoryBuffer

from vqmoe_vision.models.create import create_model

from .conftest import TINY, dense, make
from .test_weight_files import Harm, folder_of, refused

RUN = """
import sys, timm, torch, vqmoe_vision
from vqmoe_vision.models.create import create_model
sizes = dict(img_size=32, patch_size=8, embed_dim=32, depth=4, num_heads=2, num_classes=10)
file, kept = sys.argv[1], set(torch.serialization.get_safe_globals())
pretrained = dict(pretrained=True, pretrained_cfg_overlay=dict(file=file))
for made in (
    timm.create_model('vit_tiny_smoe', upcycle=file, **sizes),
    timm.create_model('vit_tiny_smoe', **pretrained, **sizes),
    create_model('vit_tiny_patch16_224', **pretrained, **sizes),
):
    print(len(made.weights_report.loaded), made.pretrained_cfg['mean'][0])
assert set(torch.serialization.get_safe_globals()) == kept
print('mmengine' in sys.modules)
"""


def test_the_checkpoint_of_a_run_is_read_without_mmengine(tmp_path: Path) -> None:
    history = HistoryBuffer([1.0, 2.0], [1, 1])
    history.current()
    state = {f'model.{name}': value for name, value in dense().state_dict().items()}
    state['normalization'] = torch.tensor([[0.25] * 3, [0.5] * 3])
    log = {'log_scalars': {'loss': history}, 'runtime_info': {'top1': np.float32(1)}}
    file = str(tmp_path / 'epoch_1.pth')
    torch.save({'state_dict': state, 'message_hub': log, 'optimizer': {}, 'meta': {}}, file)
    command = [sys.executable, '-W', 'ignore', '-c', RUN, file]
    *made, known = subprocess.check_output(command, text=True).splitlines()
    assert known == 'False'
    number = len(dense().state_dict())
    assert made == [f'{number - 8} 0.25', f'{number - 8} 0.25', f'{number} 0.25']
    # what is no log is refused as before
    harm = {'log': history, 'code': Harm()}
    torch.save({'state_dict': state, 'message_hub': harm}, file)
    with pytest.raises(subprocess.CalledProcessError) as caught:
        subprocess.run(command, capture_output=True, text=True, check=True)
    assert 'holds more than weights' in caught.value.stderr


def test_a_head_in_a_folder_is_that_of_its_classes(tmp_path: Path) -> None:
    source = dense()
    folder = folder_of(tmp_path, source, safe=True)
    config = json.loads((folder / 'config.json').read_text())
    config['pretrained_cfg'].update(label_offset=1, num_classes=10)
    (folder / 'config.json').write_text(json.dumps(config))
    model: Any = make('smoe', upcycle=f'local-dir:{folder}')
    assert torch.equal(model.head.weight, source.head.weight)
    overlay = {'label_offset': 1}
    message = r'pretrained_cfg\.label_offset=1 is not possible: 0, a head is that of its classes'
    refused(message, make, 'smoe', upcycle=f'local-dir:{folder}', pretrained_cfg_overlay=overlay)


@pytest.mark.parametrize('prefix', ['model.', 'backbone.model.', 'module.', ''])
def test_checkpoint_path_takes_the_network_out_of_a_run(prefix: str, tmp_path: Path) -> None:
    source, file = make('smoe'), str(tmp_path / 'epoch_1.pth')
    state = {f'{prefix}{name}': value for name, value in source.state_dict().items()}
    beside = {'normalization': torch.zeros(2, 3)} if 'model.' in prefix else {}
    torch.save({'state_dict': state | beside, 'meta': {}}, file)
    model = create_model('vit_tiny_smoe', checkpoint_path=file, **TINY)
    torch.testing.assert_close(model.state_dict(), source.state_dict(), rtol=0, atol=0)
    refused('of its weights$', create_model, 'vit_tiny_xmoe', checkpoint_path=file, **TINY)
