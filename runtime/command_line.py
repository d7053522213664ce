"""The command line of all scripts: parsers, types of arguments, and the start and end of a script."""

import argparse
import math
import os
import signal
import threading
import time

import torch.distributed as dist

from runtime.errors import LocalError, UserError, fail
from runtime.files import unlock_folders


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """A help formatter that appends the default to a flag's help, except where it is None or False."""

    def _get_help_string(self, action):
        # A default of 0 is shown.
        without = action.default is None or action.default is False
        return action.help if without else super()._get_help_string(action)


class ArgumentParser(argparse.ArgumentParser):
    """An argument parser that shows defaults in --help and prints an error as one line per node, with exit code 2."""

    def __init__(self, **kwargs):
        super().__init__(formatter_class=HelpFormatter, allow_abbrev=False, **kwargs)

    def error(self, message: str):
        fail(self.prog, message)


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
        unlock_folders()
    if dist.is_initialized():
        dist.destroy_process_group()


def _end_with_torchrun(torchrun: int):
    """Wait until torchrun has exited, then end this process, so that it does not keep running next to a new run.

    torchrun itself ends its processes in the same way: SIGTERM, after which training saves a checkpoint, and SIGKILL if
    the process has not ended within 30 seconds.

    Args:
        torchrun: process id of torchrun, this process's parent.
    """
    while os.getppid() == torchrun:
        time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(30)
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
