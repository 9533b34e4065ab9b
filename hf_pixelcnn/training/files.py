"""Files and folders of which at every instant the old one or the new one is there, whole, and one process writes."""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from .errors import InputError


@contextlib.contextmanager
def held(folder: str | Path) -> Iterator[None]:
    r"""
    Let no other process that asks for it write into a folder. The system ends this with the process, however that ends.

    Args:
        folder (`str` or `Path`): It need not exist; its lock is a hidden file next to it.

    Raises:
        InputError: If another process holds it, or it is the root of all folders.
    """
    folder = Path(folder).absolute()
    if not folder.name:
        raise InputError(f"cannot write into {folder}: choose a folder below it.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder.with_name(f".{folder.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise InputError(f"another process is writing into {folder}: wait until it ends, or choose another.") from error
    try:
        yield
    finally:
        with contextlib.suppress(PermissionError):  # Windows removes no open file, and this one itself when released
            Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()


@contextlib.contextmanager
def written_beside(path: str | Path) -> Iterator[Path]:
    r"""
    Write a file so that at every instant the old one or the new one is there, whole.

    Args:
        path (`str` or `Path`): The file to write or to replace; missing folders above it are made.

    Yields:
        `Path`: Where to write it: a file in the same folder that takes the place of `path` at the end, and is removed
        on any error. Of a link, the file that it leads to is written.

    Raises:
        InputError: If there is something else of that name, such as a folder or a device.
    """
    path = Path(os.path.realpath(path))
    if path.exists() and not path.is_file():
        raise InputError(f"cannot write {path}: there is a folder or a device of that name.")
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.stem}-{os.getpid()}{path.suffix}")
    try:
        yield beside
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def all_written_beside(folder: str | Path) -> Iterator[Path]:
    r"""
    Write several files of a folder so that each appears when all are written; other files of the folder stay.

    Args:
        folder (`str` or `Path`): Is made if it is missing.

    Yields:
        `Path`: Where to write them: a hidden folder in `folder`, which is removed at the end. Its files take their
        places one by one, weights last, so that no new weights lie beside an old configuration. On any error those that
        were not there before are gone again.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    beside, new = folder / f".new-{os.getpid()}", []
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir()
    try:
        yield beside
        for path in sorted(beside.iterdir(), key=lambda path: (path.suffix == ".safetensors", path.name)):
            target = folder / path.name
            new += [] if target.exists() else [target]
            os.replace(path, target)
    except BaseException:
        for target in new:
            target.unlink(missing_ok=True)
        raise
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def is_new_or_empty(folder: Path) -> bool:
    """Whether there is nothing at a path, or an empty folder."""
    return not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))


def check_new_folder(folder: Path):
    """Raise unless a folder can be made, or is an empty one that another can replace."""
    if not is_new_or_empty(folder):
        raise InputError(f"{folder} exists, and is not empty: --output must be a new or empty folder, or name a file.")
    if folder.is_mount() or folder.resolve() == Path.cwd():
        raise InputError(f"cannot write {folder}: --output must be a folder to make inside one that exists.")


@contextlib.contextmanager
def folder_beside(folder: Path) -> Iterator[Path]:
    r"""
    Fill a new or empty folder, see [`check_new_folder`], so that it is there only when it is complete; missing folders
    above it are made.

    Yields:
        `Path`: An empty hidden folder next to `folder` that takes its place at the end, and is removed on any error.
    """
    folder = folder.resolve()
    beside = folder.with_name(f".{folder.name}-{os.getpid()}")
    beside.mkdir(parents=True)
    try:
        yield beside
        if folder.exists():
            folder.rmdir()
        beside.rename(folder)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise


def write_text(text: str, path: str | Path):
    """Write a text file by [`written_beside`]."""
    with written_beside(path) as beside:
        beside.write_text(text, encoding="utf-8")


def write_json(content: dict, path: str | Path):
    """Write `content` as indented JSON by [`written_beside`]."""
    write_text(json.dumps(content, indent=2) + "\n", path)
