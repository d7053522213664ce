"""Atomic file writes, locks of folders, and checks of disk space."""

import errno
import fcntl
import json
import os
import shutil
import socket
import sys
from collections.abc import Iterable
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import numpy as np

from runtime.errors import UserError, is_first_process

# The file in a folder of results that its writer locks; it exists while the writer runs, or after it was killed.
LOCK = ".lock"
# The file in a folder of results that records what made them, so that different results are never mixed.
SETTINGS = "settings.json"
# The locks that this process holds: the locked file, its path, and the folders that were created for it.
_locks = []


def cache_folder() -> Path:
    """Return the folder in which results that can be computed again are kept between runs."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "remix-dit"


def check_disk(folder, needed: int, what: str) -> str:
    """Check that a folder's disk has enough free space.

    Args:
        folder: folder to write to; it need not exist yet.
        needed: size of what will be written, in bytes.
        what: description of what will be written, for the message.

    Returns:
        One line with the needed and the free space, in GiB.

    Raises:
        UserError: if the free space is smaller than `needed`.
    """
    folder = Path(folder).absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    estimate = f"{what}: {needed / 2**30:,.2f} GiB of the {free / 2**30:,.2f} GiB free in {folder}"
    if needed > free:
        raise UserError(f"not enough disk space for {estimate}")
    return estimate


def lock_folder(folder, flag: str):
    """Lock a folder of results until the script ends, so that no second run writes to it.

    Rank 0 holds the lock for all ranks. The operating system releases it when the process ends, even if it is killed.
    On a shared file system the lock holds for all hosts, if the file system supports that.

    Args:
        folder: the folder; it is created if it does not exist.
        flag: the flag that selects the folder, for the error message.

    Raises:
        UserError: if another process has locked the folder; the message names the process and its host.
    """
    if not is_first_process():
        return
    path = Path(folder) / LOCK
    created = [parent for parent in path.parents if not parent.exists()]
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "a")  # noqa: SIM115, the lock ends when the file is closed
        try:
            # Unlike flock, lockf does not pass the lock on to the processes of a DataLoader.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            writer = path.read_text().strip() or "another process"
            raise UserError(f"{folder} is in use by {writer}: end that run, or choose another {flag}") from None
        except OSError as error:
            print(f"{folder} cannot be locked ({error.strerror}): do not start a second run with it", file=sys.stderr)
            return
        # The previous writer may have deleted the file between its opening and its locking.
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            break
        file.close()
    _locks.append((file, path, created))
    # The lock holds on a full disk too, without the writer's name.
    with suppress(OSError):
        file.truncate(0)
        os.write(file.fileno(), f"process {os.getpid()} on {socket.gethostname()}\n".encode())


@contextmanager
def wait_for_lock(path: Path):
    """Hold the lock of a file, after any other process that holds it; without a lock if the file system has none."""
    with ExitStack() as stack:
        with suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            fcntl.lockf(stack.enter_context(open(path, "a")), fcntl.LOCK_EX)
        yield


def unlock_folders():
    """Release all locks; folders that were created for a lock and hold nothing else are removed."""
    while _locks:
        file, path, created = _locks.pop()
        with suppress(OSError):
            path.unlink()
            for parent in created:
                parent.rmdir()
        file.close()


def remove_leftovers(*folders: Path):
    """Delete the temporary files of killed writers, on the first process; call it before any process writes.

    Call it before `check_disk` as well: a large file that was not finished may fill the disk.
    """
    for folder in folders if is_first_process() else ():
        for path in Path(folder).glob(".*.tmp"):
            path.unlink(missing_ok=True)


@contextmanager
def atomic_write(path):
    """Write a file so that readers see either the old file or the complete new one, even if the writer is killed.

    On success the temporary file is flushed to disk and renamed to `path`. On an error it is removed. The file gets the
    permissions that the user's umask gives a new file.

    Args:
        path: file to write; missing parent folders are created.

    Yields:
        Path of a temporary file in the same folder, to write to.

    Raises:
        OSError: with the file's name, if it cannot be written.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with name_write_errors(path):
            temporary.touch()
            mode = temporary.stat().st_mode
            yield temporary
            # Some libraries replace the file by one that only its owner can read.
            if temporary.stat().st_mode != mode:
                temporary.chmod(mode)
            _flush(temporary)
            os.replace(temporary, path)
            _flush(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def name_write_errors(path):
    """Name the file or folder `path` in an error of writing it, such as a full disk, so that it gives one line."""
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error
    except Exception as error:
        # torch.save and safetensors raise exceptions of their own.
        known = ("(os error ", "IoError(Os ", "PytorchStreamWriter failed", "unexpected pos")
        if not any(words in str(error) for words in known):
            raise
        raise OSError(errno.EIO, "cannot be written (is the disk full?)", str(path)) from error


def check_unused(*paths):
    """Raise UserError if a file or folder that a command is to write exists.

    The scripts that write to a path of the user's choice never replace what is there. Call this before the work starts.
    """
    for path in paths:
        if Path(path).exists():
            raise UserError(f"{path} exists: choose another name, or remove it")


def write_array(path, array: np.ndarray):
    """Write an array to a .npy file, atomically."""
    array = np.ascontiguousarray(array)
    with atomic_write(path) as temporary, open(temporary, "wb") as file:
        np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array))
        # np.save would report no error if only the last bytes do not fit on the disk.
        file.write(array.data)


def write_json(path, content):
    """Write plain Python types to an indented JSON file, atomically."""
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n")


def check_settings(record: Path, settings: dict, remedy: str, ignored: Iterable[str] = (), added: Iterable[str] = ()):
    """Check that a folder's results were made with the same settings, so that different results are never mixed.

    Args:
        record: the folder's file SETTINGS.
        settings: settings of this run.
        remedy: what the user can do, for the error message.
        ignored: names of settings that may differ.
        added: names of settings that earlier versions did not record: they may be missing in the record.

    Raises:
        UserError: if any other setting differs, or if the record is damaged.
    """
    try:
        saved = dict(json.loads(record.read_text()))
    except (ValueError, TypeError):
        raise UserError(f"{record} is damaged: remove {record.parent} or {remedy}") from None
    for key in sorted((settings.keys() | saved.keys()) - ({*added} - saved.keys())):
        if key not in ignored and saved.get(key) != settings.get(key):
            before, now = str(saved.get(key)), str(settings.get(key))
            difference = f"{key}={before}, not {now}" if len(before + now) < 80 else f"another {key}"
            raise UserError(f"{record.parent} holds results with {difference}: remove it or {remedy}")


def _flush(path: Path):
    """Flush a file or a folder to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
