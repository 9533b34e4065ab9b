"""A disk that is full from some moment on, or an interrupt at that moment, for tests of what scripts leave behind."""

import contextlib
import errno
import os
import resource
import sys
from pathlib import Path

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


class Faults:
    r"""
    Counts what a program does to a folder: files opened to be written, folders made, renames. At number `at` the disk
    is full, and stays full for all that needs room, or an interrupt comes.

    Python announces these operations to audit hooks, whoever calls them, but not what safetensors and `torch.save`
    write: [`no_room_for`] fails their writes.

    Args:
        root (`Path`): The folder.
        at (`int`, *optional*): Number of the operation, from 0; `None` only counts.
        is_interrupt (`bool`): Whether an interrupt comes, instead of a full disk.
    """

    active = None

    def __init__(self, root: Path, at: int | None = None, is_interrupt: bool = False):
        self.root, self.at, self.is_interrupt = str(root), at, is_interrupt
        self.seen = []

    def __enter__(self):
        Faults.active = self
        return self

    def __exit__(self, *error):
        Faults.active = None

    def meet(self, event: str, paths: list):
        is_here = any(isinstance(path, str | os.PathLike) and str(path).startswith(self.root) for path in paths)
        if not is_here or str(paths[-1]).endswith(".py"):  # of the many sources beside a model
            return
        self.seen.append((event, *paths))
        place = len(self.seen) - 1
        if place == self.at and self.is_interrupt:
            raise KeyboardInterrupt
        needs_room = event != "os.rename"
        if self.at is not None and not self.is_interrupt and (place == self.at or (place > self.at and needs_room)):
            raise OSError(errno.ENOSPC, "No space left on device", str(paths[-1]))


def hook(event: str, arguments: tuple):
    if Faults.active is None or event not in ("open", "os.mkdir", "os.rename"):
        return
    if event == "open":
        path, mode, flags = arguments
        if not (set(mode or "") & set("wax+") or (mode is None and flags & WRITING)):
            return
        Faults.active.meet(event, [path])
    else:
        Faults.active.meet(event, list(arguments[: 2 if event == "os.rename" else 1]))


sys.addaudithook(hook)  # cannot be taken out again; without a fault it does nothing


@contextlib.contextmanager
def no_room_for(size: int):
    """Writes beyond so many bytes of a file fail, whoever makes them, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
