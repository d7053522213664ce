"""Input errors, which are printed as one line, and warnings."""

import os
import sys


class UserError(ValueError):
    """An error caused by wrong input; the message is one line that says what is wrong and how to fix it."""


class LocalError(UserError):
    """A UserError that may occur on this process only, so that every process prints its own."""


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


def first_line(error: Exception) -> str:
    """Return the first line of an error's message (at most 200 characters), or the error's type if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
