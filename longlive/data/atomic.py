"""Files that are complete or absent: written under a temporary name in the same folder, then renamed in one step."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


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
