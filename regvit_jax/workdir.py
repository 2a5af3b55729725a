"""The workdir of a run: one run at a time, one config for good, and a record of where it ran."""

import errno
import fcntl
import json
import logging
import os
import pathlib
import platform
import socket
import sys
import time

from ml_collections import ConfigDict

from regvit_jax import config as configs
from regvit_jax import provenance

# What the system says when a disk, or what this user may have of it, is full.
FULL = (errno.ENOSPC, errno.EDQUOT)


class WorkdirError(ValueError):
    """The workdir cannot be used for this run."""


class Workdir:
    """A folder held by one run (process 0 holds the lock), released by `close` or by the death of the process.

    Where the file system knows no locks there is a warning instead: two runs there are then not noticed.

    Args:
      path: made if absent; a relative one is resolved now.
      active: False on every process but the first: nothing is written or locked.

    Raises:
      WorkdirError: if another live run holds it, or it cannot be written.
    """

    def __init__(self, path: str | os.PathLike, *, active: bool = True):
        self.path = pathlib.Path(path).expanduser().absolute()
        self._active, self._lock = active, None
        if not active:
            return
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = (self.path / ".lock").open("a+")
        except (FileExistsError, NotADirectoryError) as error:
            raise WorkdirError(f"{self.path} cannot be a workdir: it is a file, or lies below one") from error
        except OSError as error:
            if error.errno in FULL:
                raise
            raise _not_writable(self.path, error.strerror) from error
        if not os.access(self.path, os.W_OK | os.X_OK):
            raise _not_writable(self.path, os.strerror(errno.EACCES))
        self._hold(lock)

    def _hold(self, lock) -> None:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES):
                lock.seek(0)
                holder = lock.read().strip() or "unknown"
                raise WorkdirError(
                    f"{self.path} is in use by another run ({holder}): wait for it or use another"
                ) from error
            logging.warning(
                "the file system of %s has no locks (%s): make sure yourself that no other run uses this workdir",
                self.path,
                error.strerror,
            )
        lock.truncate(0)
        lock.write(f"host {socket.gethostname()}, process {os.getpid()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
        lock.flush()
        self._lock = lock

    def bind(self, config: ConfigDict) -> None:
        """Ties the workdir to a config: writes config.json, or checks the one that is there.

        Raises:
          WorkdirError: if it holds another config, with the differences; keys that do not change the result may differ.
            Also if the file cannot be read.
        """
        file = self.path / "config.json"
        new = json.loads(configs.to_json(config))
        if file.is_file():
            old = _read_config(file)
            if old.get("schema") != configs.SCHEMA:
                raise WorkdirError(
                    f"{file} has config schema {old.get('schema')}, this version reads {configs.SCHEMA}: use another "
                    "workdir"
                )
            changed, runtime = configs.differences(old, new)
            if changed:
                lines = "\n".join(f"  {name}: {was!r} there, {now!r} now" for name, (was, now) in changed.items())
                raise WorkdirError(
                    f"{self.path} holds a run with another config:\n{lines}\nUse another --workdir, or give the same "
                    "values to resume."
                )
            for name, (was, now) in runtime.items():
                logging.info("config.%s: was %r, is now %r (does not change the result)", name, was, now)
        if self._active:
            _write(file, configs.to_json(config))

    def record_environment(self, devices: list) -> None:
        """env.json: versions, devices, host and command of the newest start."""
        if self._active:
            record = {
                "time": time.strftime("%Y-%m-%d %H:%M:%S %z"),
                "command": sys.argv,
                "host": socket.gethostname(),
                "python": platform.python_version(),
                "platform": platform.platform(),
                "devices": [str(d) for d in devices],
                "device_kind": devices[0].device_kind,
                "processor": provenance.processor(),
                "versions": provenance.versions(),
                "commit": provenance.commit(),
                "environment": {k: v for k, v in os.environ.items() if k.startswith(("JAX_", "XLA_", "REGVIT_"))},
            }
            _write(self.path / "env.json", json.dumps(record, indent=2) + "\n")

    def close(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def __enter__(self) -> "Workdir":
        return self

    def __exit__(self, *error) -> None:
        self.close()


def _read_config(file: pathlib.Path) -> dict:
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        config = error
    if isinstance(config, dict):
        return config
    raise WorkdirError(
        f"{file} is damaged ({config if isinstance(config, ValueError) else 'it is no JSON object'}). Put it back from "
        "a copy, or delete it: a run that has checkpoints is then compared with the config that lies in them"
    )


def _not_writable(path: pathlib.Path, why: str | None) -> WorkdirError:
    return WorkdirError(f"{path} cannot be written ({why}): give a --workdir that this user may write to")


def _write(path: pathlib.Path, text: str) -> None:
    """Whole or not at all: a kill in between, or the loss of power, leaves the old file."""
    fresh = path.with_name(f".{path.name}.new")
    with fresh.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(fresh, path)
