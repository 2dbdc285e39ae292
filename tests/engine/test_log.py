from vqmoe_vision.engine.routing_log import wrapped

PREFIX = '11/25 20:59:22 - mmengine - INFO - '


def test_a_line_that_fits_stays_one() -> None:
    text = 'Epoch(val) [1][ 3/22]    top1: 1.0  '
    assert wrapped(text) == 'Epoch(val) [1][ 3/22]  top1: 1.0'


def test_longer_ones_go_on_below() -> None:
    parts = [f'decode.loss_{i}: 0.1234' for i in range(9)]
    lines = wrapped('  '.join(['Iter(train) [   20/1000]', *parts])).split('\n')
    assert len(lines) == 3
    assert lines[0] == f'Iter(train) [   20/1000]  {parts[0]}'  # 35 + 24 + 23 + 2, 107 with another
    assert lines[1] == '    ' + '  '.join(parts[1:5])  # 4 + 4 x 21 + 3 x 2, 117 with another
    assert all(line.startswith('    ') for line in lines[1:])


def test_exactly_100_columns() -> None:
    text = 'a: ' + 'x' * 30 + '  b: ' + 'y' * 27  # 65 characters
    assert '\n' not in wrapped(text) and len(PREFIX + text) == 100
    assert '\n' in wrapped(text + 'y')
