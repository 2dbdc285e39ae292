"""Imports mmsegmentation without the lines that it prints about packages nobody asked for.

`Could not import OneDL` is written for debugging, to the screen; the warning is about an operator
of mmcv that nothing here uses. Whatever else an import prints is printed.
"""

import contextlib
import io
import warnings

_said = io.StringIO()
try:
    with contextlib.redirect_stdout(_said), warnings.catch_warnings():
        warnings.filterwarnings('ignore', 'Fail to import ``MultiScaleDeformableAttention``')
        import mmseg.datasets
        import mmseg.models  # noqa: F401
finally:
    for _line in _said.getvalue().splitlines():
        if _line != 'Could not import OneDL':
            print(_line)
