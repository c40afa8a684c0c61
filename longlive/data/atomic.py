"""Files that are complete or absent: written under a temporary name in the same folder, then renamed in one step. And
work that one process at a time does, however many there are."""

import errno
import fcntl
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import TextIO

logger = logging.getLogger(__name__)


@contextmanager
def write_aside(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path next to `path`; what was written there becomes `path` when the block ends without an
    error.

    The temporary name is hidden and fixed, so the leftovers of a killed process are overwritten by the next one.
    """
    target = Path(path)
    temporary = target.with_name(f".{target.name}.partial")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def alone(path: str | Path, wait: bool = True) -> Iterator[bool]:
    """Hold the lock of a file, which is made, with its folder, if it does not exist; the system frees it when its
    holder dies.

    Yields:
        Whether it is held: always if `wait`, else only if no other process held it.
    """
    path = Path(path)
    with _open(path) as file:
        is_held = True
        try:
            fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            is_held = False
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):
                raise
            _warn_of_no_locks(path.parent)
        yield is_held


def _open(path: Path) -> TextIO:
    while True:  # another process may remove the folder
        path.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):
            return path.open("a")


@cache
def _warn_of_no_locks(directory: Path) -> None:
    logger.warning(
        "the file system of %s has no locks: processes that write the same files at once would disturb each other, so "
        "see to it that none do",
        directory,
    )
