"""Arguments that classes of others take."""

from inspect import Parameter

from vqmoe_vision.engine.class_arguments import arguments_of


class _First:
    def __init__(self, width, depth, hidden=1):
        pass


class _Handing(_First):
    def __init__(self, *args, depth=2, **kwargs):
        super().__init__(*args, depth=depth, **kwargs)


class _Own(_First):
    def __init__(self, size):
        super().__init__(size, 1)


class _Inherits(_Own):
    pass


def test_what_is_handed_on_is_of_the_next_class() -> None:
    found = arguments_of(_Handing)
    assert found.keys() == {'depth', 'width', 'hidden'}
    # depth has a default in the nearer class, so that the class can be built without it
    needed = {name for name, p in found.items() if p.default is Parameter.empty}
    assert needed == {'width'}


def test_what_is_not_handed_on_is_not_taken() -> None:
    assert arguments_of(_Own).keys() == {'size'}
    assert arguments_of(_Inherits).keys() == {'size'}
