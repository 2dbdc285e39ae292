"""A hub that cannot be reached is given up in seconds; one that is slow is waited for as ever."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from urllib.parse import urlsplit

from huggingface_hub.errors import OfflineModeIsEnabled
from huggingface_hub.utils import get_session

# Seconds before another attempt to connect. Its client makes twelve of two files in 80 seconds, and
# a line of each; an attempt has 10 seconds here as there.
_WAITS = (1.0, 2.0)
# What the libraries below the hub's client, which differ by its version, call a connection that
# does not come about. An answer that is late or an error of the server is none of them.
_UNREACHED = frozenset({'ConnectError', 'ConnectTimeout', 'ConnectionError'})


@contextmanager
def hub_in_reach() -> Iterator[None]:
    """Within it, a hub that no attempt reaches is taken for one that is offline."""
    session = get_session()
    own, nested = session.request, 'request' in vars(session)
    session.request = partial(_reaching, own, {})  # type: ignore[method-assign]
    try:
        yield
    finally:
        del session.request
        if nested:
            session.request = own  # type: ignore[method-assign]


def _reaching(
    request: Callable[..., Any], failed: dict[str, Exception], *args: Any, **kw: Any
) -> Any:
    """A request of the client, which retries by itself all that is raised but this."""
    host = urlsplit(str(kw.get('url', args[-1] if args else ''))).netloc
    for wait in (*_WAITS, None) if host not in failed else ():
        try:
            return request(*args, **kw)
        except Exception as error:
            if not _UNREACHED & {kind.__name__ for kind in type(error).__mro__}:
                raise
            if wait is None:
                failed[host] = error
            else:
                time.sleep(wait)
    cause = failed[host]
    raise OfflineModeIsEnabled(f'the hub cannot be reached: {cause}') from cause
