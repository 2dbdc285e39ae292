"""The log file of a run, as messages."""

import re
from pathlib import Path

# in a file the year stands in front of what a terminal shows
_DATE = r'\d{4}/(?=\d\d/\d\d \d\d:\d\d:\d\d - mmengine - )'


def messages(work_dir: Path) -> list[str]:
    """What a terminal shows of each message, one or more lines."""
    (log,) = work_dir.glob('*/*.log')
    return [part.rstrip('\n') for part in re.split(f'^{_DATE}', log.read_text(), flags=re.M)[1:]]


def reports(work_dir: Path) -> list[str]:
    """Messages with losses, scores, or the load of experts."""
    told = re.compile(r'INFO - (Iter|Epoch)\(|INFO - (train_epoch|val|test)  ')
    return [message for message in messages(work_dir) if told.search(message)]
