"""Files from the Hugging Face hub."""

import functools

from runtime.errors import LocalError, UserError, first_line

# A file on the hub is named hf:OWNER/REPOSITORY/FILE.
PREFIX = "hf:"


@functools.cache
def offline() -> bool:
    """Return whether the hub cannot be reached. huggingface_hub itself would retry for half a minute to find out."""
    # The import takes a second, and most runs never need it.
    from huggingface_hub import constants, get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=5)
    except Exception:
        # The network and the HTTP library raise errors of many kinds.
        return True
    return False


@functools.cache
def local_file(path):
    """Return the local path of a file.

    Args:
        path: a path, or hf:OWNER/REPOSITORY/FILE for a file on the hub, which is downloaded unless it is in the cache.

    Returns:
        `path` itself unless it names a file on the hub. Within a process the same name gives the same revision.

    Raises:
        UserError: if the name of a file on the hub is incomplete, or if the hub has no such file or cannot be reached.
    """
    if not str(path).startswith(PREFIX):
        return path
    owner, _, rest = str(path).removeprefix(PREFIX).partition("/")
    repository, _, file = rest.partition("/")
    if not (owner and repository and file):
        raise UserError(f"{path}: a file on the Hugging Face hub is named {PREFIX}OWNER/REPOSITORY/FILE")
    from huggingface_hub import hf_hub_download

    try:
        return hf_hub_download(f"{owner}/{repository}", file, local_files_only=offline())
    except Exception as error:
        # The network, the hub and huggingface_hub raise errors of many kinds.
        reason = "the hub cannot be reached, and the file is not in its cache" if offline() else first_line(error)
        raise LocalError(f"{path}: not found on the Hugging Face hub: {reason}") from None
