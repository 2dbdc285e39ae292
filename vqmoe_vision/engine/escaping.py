"""Text from files of others, for places where some of its signs would mean something."""

import html

_MARKDOWN = {ord(sign): f'&#{ord(sign)};' for sign in '[]|`*~\\'}


def printable(text: object) -> str:
    """Return a text on one line, whose signs that steer a terminal are written as Python does."""
    signs = (c if c.isprintable() else c.encode('unicode_escape').decode() for c in str(text))
    return ''.join(signs)


def as_markdown(text: object) -> str:
    """Return a text in which neither Markdown nor HTML finds markup."""
    return html.escape(printable(text), quote=False).translate(_MARKDOWN)


def as_cell(text: object) -> str:
    """Return a text that no spreadsheet takes for a formula."""
    cell = printable(text)
    return f"'{cell}" if cell.lstrip().startswith(('=', '+', '-', '@')) else cell
