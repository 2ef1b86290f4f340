"""Claims on work that several processes share: a locked file beside its unfinished files.

The lock is the kernel's (`flock`), so it ends with its process, however that ends; a claim is never stale. Across
machines it holds where the file system passes locks on, as NFS does. Where there are none, every process goes on, and
the first to store a result stores it.
"""

from __future__ import annotations

import errno
import fcntl
import os
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from forgetcast.files import make_folder

_WITHOUT_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


@contextmanager
def claimed(path: Path, on_wait: Callable[[str], None] | None = None) -> Iterator[bool]:
    """Claim work for the block.

    Parameters
    ----------
    path : Path
        Where its unfinished files are, or would be; the claim is PATH.lock.
    on_wait : callable, optional
        Called with who has the claim, such as "process 4711", before it is waited for; default: not waited for.

    Yields
    ------
    bool
        False: another process has the claim.

    Raises
    ------
    OSError
        If the claim cannot be written.
    """
    lock = path.with_name(f"{path.name}.lock")
    file = _locked(lock, on_wait)
    if file is None:
        yield False
        return
    try:
        yield True
    finally:
        lock.unlink(missing_ok=True)  # before it is unlocked: who has it open finds that it is another file now
        file.close()


def _locked(lock: Path, on_wait: Callable[[str], None] | None) -> IO[str] | None:
    """Open and lock the file that has this name in the end; None if another process has it and is not waited for."""
    while True:
        try:
            make_folder(lock.parent)
            file = lock.open("a+", encoding="utf-8")
        except FileNotFoundError:  # another process has just removed the empty folder
            continue
        try:
            if not _lock(file, on_wait):
                file.close()
                return None
            if lock.exists() and os.path.samestat(lock.stat(), os.fstat(file.fileno())):
                file.truncate(0)
                file.write(f"process {os.getpid()} on {platform.node()}")
                file.flush()
                return file
        except FileNotFoundError:
            pass
        except BaseException:
            file.close()
            raise
        file.close()


def _lock(file: IO[str], on_wait: Callable[[str], None] | None) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        if on_wait is None:
            return False
        file.seek(0)
        on_wait(file.read() or "another process")
        fcntl.flock(file, fcntl.LOCK_EX)
    except OSError as error:
        if error.errno not in _WITHOUT_LOCKS:
            raise
    return True
