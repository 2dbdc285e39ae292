"""Imports mmsegmentation without the lines that it prints about other packages."""

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
