"""A folder that is there whole or not at all."""

from __future__ import annotations

import os
import shutil
import uuid
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock
from safetensors import SafetensorError

from comeba_ext.errors import StorageError
from comeba_ext.storage import LOCK, settle, sweep


def must_be_new(path: str | Path) -> Path:
    """The path of a folder that is to be made.

    Raises:
        StorageError: there is something already; an empty folder is nothing.
    """
    path = Path(path)
    if path.is_symlink() or (path.exists() and (not path.is_dir() or any(path.iterdir()))):
        raise StorageError(f"{path} is there already and not an empty folder; choose another one, nothing was written")
    return path


@contextmanager
def new_folder(path: str | Path):
    """A folder to fill, which becomes ``path`` when it is whole; on an error or a kill there is none.

    Raises:
        StorageError: as :func:`must_be_new`, or nothing can be written there.
    """
    path = must_be_new(Path(path).absolute())
    staging = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    lock = FileLock(staging / LOCK, timeout=0)
    try:
        sweep(path)
        staging.mkdir(parents=True)
        lock.acquire()
        yield staging
        for file in staging.rglob("*"):
            if file.is_file():
                settle(file)
        lock.release()
        (staging / LOCK).unlink(missing_ok=True)
        if must_be_new(path).exists():
            path.rmdir()
        os.replace(staging, path)
    except (OSError, SafetensorError) as error:
        raise StorageError(f"{path}: could not be written ({error})") from None
    finally:
        lock.release()
        shutil.rmtree(staging, ignore_errors=True)
