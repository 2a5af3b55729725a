"""What can be wrong with a checkpoint: the errors, the seal that shows damage, what belongs into a message."""

import errno
import json
import os
import re
import shutil
import zlib
from collections.abc import Mapping

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

_OWN_FAULT = (errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE, errno.ENOMEM)


class CheckpointMismatch(ValueError):
    """The checkpoint holds other leaves, shapes or dtypes than the state it is to be restored into."""


class CheckpointDamaged(ValueError):
    """A file of the checkpoint is missing, unreadable, or does not say what was saved."""


class CheckpointNotSaved(OSError):
    """A checkpoint could not be written; the earlier ones are as they were."""


def sealed(data: dict, meta: dict, checksums: Mapping[str, int]) -> dict:
    """`meta` with "checksums": those of the arrays, by item, and "text", of everything else."""
    arrays = {name: value for name, value in checksums.items() if name != "text"}
    text = json.dumps([data, meta, arrays], sort_keys=True)
    return meta | {"checksums": arrays | {"text": zlib.crc32(text.encode())}}


def is_damage(error: Exception) -> bool:
    """Whether files are to blame, and neither the caller nor this machine's limits."""
    error = _root(error)
    if isinstance(error, CheckpointMismatch | MemoryError | jax.errors.JaxRuntimeError):
        return False
    if isinstance(error, OSError) and error.errno in _OWN_FAULT:
        return False
    return not any(word in str(error) for word in ("PERMISSION_DENIED", "RESOURCE_EXHAUSTED", "UNAVAILABLE"))


def anywhere(flag: bool) -> bool:
    """Whether `flag` is set on any process; all of them make the call, and none returns before all have made it."""
    if jax.process_count() == 1:
        return flag
    return bool(multihost_utils.process_allgather(np.int32(flag)).any())


def in_one_line(error: BaseException) -> str:
    """What happened, and the file it happened to, which TensorStore names at the end of a long line."""
    error = _root(error)
    text = " ".join((str(error).splitlines() or [""])[0].split())
    files = re.findall(r'local file "([^"]+)"', text)
    if len(text) > 160:
        text = f"{text[:160]}..." + (f" {files[-1]}" if files else "")
    return text if isinstance(error, CheckpointDamaged) else f"{type(error).__name__}: {text}"


def space(directory: epath.Path) -> str:
    """How full the disk is."""
    try:
        usage = shutil.disk_usage(os.fspath(directory))
    except OSError:  # not a local disk, or it is gone
        return "the space left is not known"
    return f"{usage.free / 2**20:,.1f} MiB of {usage.total / 2**20:,.0f} MiB are free there"


def _root(error: BaseException) -> BaseException:
    """Orbax wraps what TensorStore says into an Exception that says to look there."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error
