"""The segmentor in DistributedDataParallel: losses inside, no parameter without a gradient."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from mmengine.registry import init_default_scope
from torch.nn.parallel import DistributedDataParallel

from vqmoe_vision.moe import METHODS, update_state

from ..forked import spawn
from ..groups import begin
from .conftest import tiny_segmentor, training_batch

WORLD = 2


def worker(rank: int, folder: Path) -> None:
    begin(rank, WORLD, folder)
    init_default_scope('mmseg')
    found = {}
    for method in METHODS:
        torch.manual_seed(0)
        model = tiny_segmentor(f'vit_tiny_{method}')
        wrapped = DistributedDataParallel(model, broadcast_buffers=False)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        torch.manual_seed(rank)  # every rank has images of its own
        for _ in range(2):  # the second forward fails if a parameter had no gradient
            entries = wrapped(**training_batch(model), mode='loss')
            total, _ = model.parse_losses(entries)
            total.backward()
            optimizer.step()
            optimizer.zero_grad()
            update_state(model.routed_model)
        losses = {name: value.detach() for name, value in entries.items() if 'loss' in name}
        found[method] = {'state': model.state_dict(), 'losses': losses}
    torch.save(found, folder / f'rank{rank}.pth')
    dist.destroy_process_group()


@pytest.fixture(scope='module')
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    folder = tmp_path_factory.mktemp('ddp')
    spawn(worker, (folder,), nprocs=WORLD)
    return [torch.load(folder / f'rank{rank}.pth', weights_only=True) for rank in range(WORLD)]


@pytest.mark.parametrize('method', METHODS)
def test_ranks_train_one_model(ranks: list[dict], method: str) -> None:
    first, second = (rank[method] for rank in ranks)
    torch.testing.assert_close(first, second, rtol=0, atol=0)  # losses are of the images of both
    assert 'decode.loss_ce' in first['losses']
    torch.manual_seed(0)
    start = tiny_segmentor(f'vit_tiny_{method}').state_dict()
    names = ['decode_head.cls_emb', 'backbone.model.blocks.1.mlp.experts.fc1.weight']
    if method == 'vqmoe':
        assert 'blocks.1.mlp/vq_loss' in first['losses']
        names.append('backbone.model.blocks.1.mlp.quantizer.codebook.embed')
    assert not any(torch.equal(first['state'][name], start[name]) for name in names)
