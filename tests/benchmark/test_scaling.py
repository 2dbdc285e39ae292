"""What many processes cost: formulas by hand, and against what processes here count and send."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from benchmark import scaling
from benchmark.cli import main
from benchmark.scaling import build, measure_scaling, sizes_of
from benchmark.scaling_costs import (
    DDP,
    FSDP2,
    Block,
    Cluster,
    Memory,
    Network,
    Transfer,
    efficiency,
    memory,
    part,
    seconds,
    transfers,
)
from benchmark.scaling_measured import CollectiveCounter, train_step
from vqmoe_vision.models.sharding import shard_model

# dense 8 * 4 = 32, experts 4 * 8 * 4 + 4 * 8 = 160: P = 2 * 192 + 24 + 5 + 10 = 423
NETWORK = Network(
    blocks=(Block(dense=((8, 4),), experts=((4, 8, 4), (4, 8))),) * 2,
    rest=((1, 6, 4), (5,)),
    whole=10,
    codebooks=((4, 4),),
    row_elements=100,
    macs=10**6,
)
SIZE = 'img_size=16,patch_size=8,embed_dim=32,depth=2,num_heads=2,num_classes=10'
TINY = f'vit_tiny_vqmoe,{SIZE},num_experts=4'
# means of losses and counts of rows, which formulas leave out, in bytes: under a hundred per layer
SMALL = 200


def added(sent: list[Transfer]) -> dict[str, float]:
    return {t.what: sum(u.sent for u in sent if u.what == t.what) for t in sent}


def test_each_part_is_along_a_dimension_that_divides() -> None:
    assert part((8, 6), 4) == 2 * 6
    assert part((3, 8, 6), 4) == 3 * 2 * 6
    assert part((1, 3, 8), 4) == 3 * 2
    assert part((5,), 4) == 2  # 2 + 2 + 1 + 0, filled up to 8


# 4 * (4 + 1) numbers of counts and sums, 1024 * 4 of tokens, in float32, all-reduced by four:
# 4 * 4116 * 2 * 3 / 4 = 24696; 1024 draws of 8 bytes from each of them: 4 * 8192 * 3 / 4 = 24576
CODEBOOKS = 24696 + 24576


@pytest.mark.parametrize(
    ('placed', 'expected'),
    [
        (DDP, {'gradients': 2 * 3 / 4 * 4 * 423}),
        (
            FSDP2,
            {
                # two gathers of 2 * 192, one of 24 and of 5 filled up to 8
                'parameters': 3 / 4 * 4 * (2 * 384 + 32),
                'gradients': 3 / 4 * 4 * (384 + 32) + 2 * 3 / 4 * 4 * 10,
                'rows': 0,
            },
        ),
        (
            2,
            {
                # of an expert's 2 * 160 numbers a process has half, in two groups
                'parameters': 3 / 4 * 4 * (2 * 64 + 32) + 1 / 2 * 4 * 2 * 160,
                'gradients': 3 / 4 * 4 * (64 + 32) + 1 / 2 * 4 * 160 + 2 * 3 / 4 * 4 * 10,
                # of three images, four times, half of the rows to the other process
                'rows': 4 * 1 / 2 * 4 * 100 * 3,
            },
        ),
    ],
)
def test_bytes_of_a_step(placed: int, expected: dict[str, float]) -> None:
    found = added(transfers(NETWORK, placed, 4, images=3))
    assert found == {**expected, 'codebooks': CODEBOOKS}


def test_half_precision_halves_parameters_and_rows() -> None:
    full, half = (added(transfers(NETWORK, 2, 4, 3, size, size)) for size in (4, 2))
    assert half == {**full, 'parameters': full['parameters'] / 2, 'rows': full['rows'] / 2}


def test_bytes_of_a_process() -> None:
    assert memory(NETWORK, DDP, 4) == Memory(4 * 423, 4 * 423, 8 * 423, 4 * 423)
    # 10 whole, 24 / 4, two of 5, 384 / 4; beside: 24 and 5 filled up to 8, and two blocks, and the
    # gradient of one
    own, beside = 10 + 6 + 2 + 96, 4 * (32 + 2 * 192) + 4 * 192
    assert memory(NETWORK, FSDP2, 4) == Memory(4 * own, 4 * own, 8 * own, beside)
    # half of the experts at a time
    beside = 4 * (32 + 2 * (32 + 80)) + 4 * (32 + 80)
    assert memory(NETWORK, 2, 4) == Memory(4 * own, 4 * own, 8 * own, beside)


def test_time_of_a_step() -> None:
    cluster = Cluster(gpus=4, inside=100, between=10, flops=1000, used=0.5)
    sent = [
        Transfer('gradients', 'all', 50),
        Transfer('gradients', 'groups', 30),
        Transfer('rows', 'experts', 20),
    ]
    assert seconds(sent, 2, 4, cluster) == (80 / 100, 20 / 100)
    # two groups share the link between two machines; rows stay on one
    assert seconds(sent, 2, 8, cluster) == (50 / 10 + 30 / 5, 20 / 100)
    # 6 * 250 * 2 / 500 = 6 s of computing beside 2 * 3 / 4 * 4 * 100 / 100 = 6 s of sending
    network = Network(blocks=(Block(dense=((100,),)),), macs=250)
    assert efficiency(network, DDP, 4, 2, cluster) == (0.5, 1.0)


def test_sizes_of_a_network() -> None:
    model = build(TINY)
    network = sizes_of(model)
    assert network.params == sum(p.numel() for p in model.parameters())
    # the router 4 * 32, the gate 2 * 32 + 2; the norm of codes is spread
    assert network.whole == 128 + 66
    # one layer, 4 patches and the class token, two experts each
    assert network.row_elements == 5 * 2 * 32
    assert network.codebooks == ((4, 32),)


@pytest.fixture
def sixteen_processes() -> Iterator[int]:
    """Of which the others are not there, and nothing is sent."""
    dist.init_process_group('fake', store=FakeStore(), rank=0, world_size=16)
    yield 16
    dist.destroy_process_group()


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_calls_of_fsdp2_are_those_of_the_formula(
    sixteen_processes: int, dtype: torch.dtype
) -> None:
    """With four times as many processes as experts."""
    model = build(TINY).train()
    network = sizes_of(model)
    shard_model(model, param_dtype=dtype)
    train_step(model, model, images=2)  # the codebook starts
    with CollectiveCounter() as counter:
        train_step(model, model, images=2)
    sent = transfers(network, FSDP2, sixteen_processes, 2, parameter_bytes=dtype.itemsize)
    expected = sum(t.sent for t in sent)
    assert sum(counter.sent.values()) == pytest.approx(expected, abs=SMALL)


@pytest.mark.long
@pytest.mark.parametrize('options', ['num_experts=4', 'num_experts=2'])
@pytest.mark.parametrize('processes', [2, 4])
def test_processes_send_and_keep_what_formulas_say(processes: int, options: str) -> None:
    rows = measure_scaling(f'vit_tiny_vqmoe,{SIZE},{options}', 16, [processes])
    assert {'DDP', 'FSDP2', 'experts on 2'} <= {row['way'] for row in rows}
    for row in rows:
        # where processes choose different shares of an expert, the mean of rows to others is not
        # that of even load; of all bytes here rows are a tenth
        assert row['counted'] == pytest.approx(row['sent'], rel=0.01, abs=SMALL)
        if row['sockets'] is not None:
            # each message has a header, and there are some hundred messages
            assert row['sockets'] == pytest.approx(row['gloo'], rel=0.03, abs=30_000)
        assert row['kept'] == row['memory']


def test_large_networks_by_formula(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    dense = f'vit_tiny_patch16_224,{SIZE}'
    sparse = f'vit_tiny_vqmoe,{SIZE},num_experts=8'
    monkeypatch.setattr(scaling, 'LARGE', {'dense': dense, 'sparse': sparse})
    out = tmp_path / 'run.json'
    main(['scaling', '--model-only', '--between', '25', '--batch', '2', '--out', str(out)])
    run = json.loads(out.read_text())
    assert run['assumed']['between'] == 25e9
    ways = ['DDP', 'FSDP2', 'DDP', 'FSDP2', 'experts on 8']
    assert [row['way'] for row in run['rows'] if row['gpus'] == 64] == ways
    printed = capsys.readouterr().out
    assert printed.count('| network | way | 8 GPUs | 32 GPUs | 64 GPUs | 256 GPUs |') == 3


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ('--processes 1', r'--processes=\[1\] is not possible: at least 2 each'),
        ('--batch 0', '--batch=0 is not possible: at least 1'),
        ('--model-only --batch 0', '--batch=0 is not possible: at least 1'),
        ('--model-only --between 0', 'between=0.0 is not possible: above 0'),
        ('--model-only --processes 2', r'--processes=\[2\] is not possible: only without --model'),
        ('--between 3', '--between=3.0 is not possible: only with --model-only'),
        ('--model resnet18', 'model=ResNet is not possible: a timm VisionTransformer or Eva'),
    ],
)
def test_mistakes_are_one_line(arguments: str, message: str) -> None:
    with pytest.raises(SystemExit, match=f'error: {message}'):
        main(['scaling', *arguments.split()])
