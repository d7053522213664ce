"""What every script and file format relies on: one kind of error for people, and writes that are never half done."""

import argparse
import json
import math
import os
import shutil
import sys
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist


class UserError(ValueError):
    """A mistake its user can mend; the message is one line that says what is wrong and what to do."""


class LocalError(UserError):
    """A UserError that this process may be alone to meet."""


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Appends the default, where there is one."""

    def _get_help_string(self, action):
        return action.help if action.default is None else super()._get_help_string(action)


class ArgumentParser(argparse.ArgumentParser):
    """argparse with defaults in --help and one-line errors (exit code 2), printed once a node."""

    def __init__(self, **kwargs):
        super().__init__(formatter_class=HelpFormatter, allow_abbrev=False, **kwargs)

    def error(self, message: str):
        fail(self.prog, message)


def fail(prog: str, message: str, everywhere: bool = False):
    """Print `message` as one line on the first rank of every node (or on every rank) and exit with code 2."""
    rank = int(os.environ.get("RANK", 0))
    if everywhere or int(os.environ.get("LOCAL_RANK", 0)) == 0:
        where = f" (rank {rank})" if rank else ""
        print(f"{prog}: error{where}: {' '.join(message.split())}", file=sys.stderr, flush=True)
    raise SystemExit(2)


def run_script(main, parser: ArgumentParser):
    """Parse the command line and run `main(args)`; a UserError ends every rank with one line and exit code 2."""
    args = parser.parse_args()
    try:
        main(args)
    except UserError as error:
        # Before the process group exists the ranks of a node meet the same error; afterwards it may be one rank's own.
        message = str(error)
        if "Original Traceback" in message:  # one that a DataLoader's worker met, which arrives with its traceback
            message = message.strip().splitlines()[-1].partition(": ")[2]
        fail(parser.prog, message, everywhere=dist.is_initialized() or isinstance(error, LocalError))
    except OSError as error:
        if error.filename is None:
            raise
        fail(parser.prog, f"{error.filename}: {error.strerror}", everywhere=True)
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    if dist.is_initialized():
        dist.destroy_process_group()


def number(kind, low=-math.inf, high=math.inf, *, above=False):
    """An argparse type: an int or a float within [low, high] (or above `low`, if `above`)."""

    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (low <= value <= high) or (above and value == low) or not math.isfinite(value):
            bounds = f"{'above' if above else 'at least'} {low}" + (f" and at most {high}" if high < math.inf else "")
            raise argparse.ArgumentTypeError(
                f"expected {'a whole number' if kind is int else 'a number'} {bounds}, got {text!r}"
            )
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


def folder_name(text: str) -> str:
    """An argparse type: one folder name, which cannot lead outside the folder it is joined to."""
    if text in ("", ".", "..") or "/" in text or "\\" in text or "\0" in text:
        raise argparse.ArgumentTypeError(f"expected a plain folder name, got {text!r}")
    return text


def first_line(error: Exception) -> str:
    """The first line of an error's message, or its kind where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def check_disk(folder, needed: int, what: str) -> str:
    """Say how much of the free space below `folder` it takes to write `what`, in bytes. Raises UserError if that is too much."""
    folder = Path(folder).absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    estimate = f"{what}: {needed / 2**30:,.2f} GiB of the {free / 2**30:,.2f} free in {folder}"
    if needed > free:
        raise UserError(f"not enough disk space for {estimate}")
    return estimate


def remove_leftovers(*folders: Path):
    """Delete what writers that were killed left beside their files. For one process, before any other writes."""
    for folder in folders:
        for path in Path(folder).glob(".*.tmp"):
            path.unlink(missing_ok=True)


@contextmanager
def atomic_write(path):
    """Yield a temporary path beside `path`; on success flush it to disk and rename it over `path`, else remove it.

    A reader sees the old file or the whole new one, whenever the writer is killed.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        _flush(temporary)
        os.replace(temporary, path)
        _flush(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path, content):
    """Write plain types to a file that people may read too, whole or not at all."""
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n")


def check_settings(record: Path, settings: dict, remedy: str, but: tuple[str, ...] = ()):
    """Refuse to mix results: raise UserError where `record`, a folder's settings.json, differs from `settings`.

    but: settings that may differ; remedy: what to do, for the error.
    """
    before = json.loads(record.read_text())
    for key in settings.keys() | before.keys():
        if key not in but and before.get(key) != settings.get(key):
            was, now = (str(values.get(key)) for values in (before, settings))
            said = f"{key}={was}, not {now}" if len(was + now) < 80 else f"another {key}"
            raise UserError(f"{record.parent} holds results with {said}: remove it or {remedy}")


def _flush(path: Path):
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
