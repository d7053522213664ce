"""Input errors, atomic file writes, locks of folders and argument parsing shared by all scripts."""

import argparse
import errno
import fcntl
import json
import math
import os
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterable
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import numpy as np
import torch.distributed as dist

# Choices of --timestep-frequencies, and the `frequency_shift` of a DiT that they stand for.
TIMESTEP_FREQUENCIES = {"published": 0, "diffusers": 1}
TIMESTEP_FREQUENCIES_FLAG = dict(
    choices=[*TIMESTEP_FREQUENCIES],
    help="frequencies of the timestep embedding that the weights were trained with: those of the published DiT, or "
    "those of diffusers' DiTTransformer2DModel (default: the file's, or published)",
)
# The file in a folder of results that its writer locks; it exists while the writer runs, or after it was killed.
LOCK = ".lock"
# The locks that this process holds: the locked file, its path, and the folders that were created for it.
_locks = []


class UserError(ValueError):
    """An error caused by wrong input; the message is one line that says what is wrong and how to fix it."""


class LocalError(UserError):
    """A UserError that may occur on this process only, so that every process prints its own."""


def frequency_override(choice: str | None) -> dict[str, int]:
    """Return the keyword argument of a DiT that a choice of --timestep-frequencies gives; none without the flag."""
    return {} if choice is None else {"frequency_shift": TIMESTEP_FREQUENCIES[choice]}


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """A help formatter that appends the default to a flag's help, except where it is None."""

    def _get_help_string(self, action):
        return action.help if action.default is None else super()._get_help_string(action)


class ArgumentParser(argparse.ArgumentParser):
    """An argument parser that shows defaults in --help and prints an error as one line per node, with exit code 2."""

    def __init__(self, **kwargs):
        super().__init__(formatter_class=HelpFormatter, allow_abbrev=False, **kwargs)

    def error(self, message: str):
        fail(self.prog, message)


def is_first_process() -> bool:
    """Return whether this process has rank 0; it is known before the process group exists."""
    return int(os.environ.get("RANK", 0)) == 0


def warn(message: str):
    """Print a warning on stderr, on the first process only."""
    if is_first_process():
        print(f"warning: {message}", file=sys.stderr, flush=True)


def fail(prog: str, message: str, everywhere: bool = False):
    """Print an error as one line and exit with code 2.

    Args:
        prog: name of the script, printed before the message.
        message: the error; line breaks become spaces.
        everywhere: print on every rank, not only on the first rank of every node.

    Raises:
        SystemExit: always, with code 2.
    """
    rank = int(os.environ.get("RANK", 0))
    if everywhere or int(os.environ.get("LOCAL_RANK", 0)) == 0:
        where = f" (rank {rank})" if rank else ""
        print(f"{prog}: error{where}: {' '.join(message.split())}", file=sys.stderr, flush=True)
    raise SystemExit(2)


def run_script(main, parser: ArgumentParser):
    """Parse the command line and run a script's main function.

    A UserError, or an OSError that names a file, ends every rank with a one-line message and exit code 2.
    Ctrl-C ends the script with exit code 130. The folders that the script locked are unlocked at the end.

    Args:
        main: function that takes the parsed arguments (argparse.Namespace).
        parser: parser of the script's flags.
    """
    args = parser.parse_args()
    if "TORCHELASTIC_RUN_ID" in os.environ:
        threading.Thread(target=_end_with_torchrun, args=(os.getppid(),), daemon=True).start()
    try:
        main(args)
    except UserError as error:
        # Before the process group exists, all ranks of a node raise the same error. Later, one rank may fail alone.
        message = str(error)
        # An error from a DataLoader's worker arrives as the text of its traceback; the last line holds the message.
        if "Original Traceback" in message:
            message = message.strip().splitlines()[-1].partition(": ")[2]
        fail(parser.prog, message, everywhere=dist.is_initialized() or isinstance(error, LocalError))
    except OSError as error:
        if error.filename is None:
            raise
        fail(parser.prog, f"{error.filename}: {error.strerror}", everywhere=True)
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    finally:
        _unlock_folders()
    if dist.is_initialized():
        dist.destroy_process_group()


def _end_with_torchrun(torchrun: int, patience: float = 30):
    """Wait until torchrun is gone, then end this process, so that it does not go on beside a new run.

    torchrun itself ends its processes in the same way: SIGTERM, after which training saves a checkpoint, and SIGKILL if
    the process has not ended within 30 seconds.

    Args:
        torchrun: process id of torchrun, this process's parent.
        patience: time between the signals, in seconds.
    """
    while os.getppid() == torchrun:
        time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(patience)
    os.kill(os.getpid(), signal.SIGKILL)


def number(kind, low=-math.inf, high=math.inf, *, above=False):
    """Make an argparse type for a finite number within bounds.

    Args:
        kind: int or float.
        low: smallest value.
        high: largest value.
        above: exclude `low` itself.

    Returns:
        A function that converts a string to `kind` and raises argparse.ArgumentTypeError for any other string.
    """

    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (low <= value <= high) or (above and value == low) or not math.isfinite(value):
            bounds = f" {'above' if above else 'at least'} {low}" if low > -math.inf else ""
            bounds += f" and at most {high}" if high < math.inf else ""
            kind_name = "a whole number" if kind is int else "a finite number"
            raise argparse.ArgumentTypeError(f"expected {kind_name}{bounds}, got {text!r}")
        return value

    return parse


positive_int = number(int, 1)
seed_int = number(int, 0, 2**63 - 1)


def flags(**values) -> list[str]:
    """Turn keyword arguments into command-line flags.

    Args:
        **values: value of each flag, with underscores for the dashes of its name. True gives --name, False gives
            --no-name, a list or tuple gives --name and its items, None gives nothing, any other value --name=value.

    Returns:
        The words of the command line.
    """
    words = []
    for key, value in values.items():
        name = key.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no-{name}")
        elif isinstance(value, list | tuple):
            words += [f"--{name}", *map(str, value)]
        elif value is not None:
            words.append(f"--{name}={value}")
    return words


def counted(n: int, singular: str, plural: str | None = None) -> str:
    """Return a number with its noun, such as "1 step" and "1,000 steps"; `plural` is singular + "s" if not given."""
    return f"{n:,} {singular if n == 1 else plural or singular + 's'}"


def folder_name(text: str) -> str:
    """Check one folder name without separators, as an argparse type; it cannot lead outside its parent folder."""
    if text in ("", ".", "..") or "/" in text or "\\" in text or "\0" in text:
        raise argparse.ArgumentTypeError(f"expected a plain folder name, got {text!r}")
    return text


def first_line(error: Exception) -> str:
    """Return the first line of an error's message (at most 200 characters), or the error's type if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


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
            print(f"{folder} cannot be locked ({error.strerror}): start no second run with it", file=sys.stderr)
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


def _unlock_folders():
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
        if not any(words in str(error) for words in ("(os error ", "PytorchStreamWriter failed", "unexpected pos")):
            raise
        raise OSError(errno.EIO, "cannot be written (is the disk full?)", str(path)) from error


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


def check_settings(
    record: Path, settings: dict, remedy: str, ignored: Iterable[str] = (), defaults: dict | None = None
):
    """Check that a folder's results were made with the same settings, so that different results are never mixed.

    Args:
        record: the folder's settings.json.
        settings: settings of this run.
        remedy: what the user can do, for the error message.
        ignored: names of settings that may differ.
        defaults: values of settings that may be omitted.

    Raises:
        UserError: if any other setting differs.
    """
    saved, settings = ({**(defaults or {}), **given} for given in (json.loads(record.read_text()), settings))
    for key in sorted(settings.keys() | saved.keys()):
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
