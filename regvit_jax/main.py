"""Trains, evaluates and resumes one run.

    python -m regvit_jax.main --config=configs/quickstart.py --workdir=runs/quickstart
    python -m regvit_jax.main --config=configs/cifar10_vit.py --workdir=runs/cifar --config.data.train=npz:cifar10.npz

--config     a Python file with get_config(); configs/ holds examples, each says what it does, how long it takes and
             what to expect
--config.X   changes one key: --config.optim.lr=3e-4  --config.model.registers=8  --config.total_steps=4
--workdir    where checkpoints, metrics and results go. The same command again resumes; another config is refused with
             the differences
--keys       prints every key of the config's recipe with its value and meaning, and ends

On several hosts run the same command on each. TPU pods and SLURM are detected with --distributed; elsewhere give each
process --coordinator=HOST:PORT --num_processes=N --process_id=I.
"""

# Data workers are spawned and import this module again: nothing heavy up here.
import logging
import os
import re
import sys
import traceback

from absl import app, flags
from ml_collections import config_flags

_CONFIG = config_flags.DEFINE_config_file("config", None, "Python file with get_config().", lock_config=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run.")
_KEYS = flags.DEFINE_bool("keys", False, "Print every key with its meaning and end.")
_DISTRIBUTED = flags.DEFINE_bool("distributed", False, "Join the processes of a TPU pod or SLURM job.")
_COORDINATOR = flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0, where processes are not detected.")
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "With --coordinator: how many.")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "With --coordinator: which one this is.")

STOPPED = 143  # what a shell reports for a process that SIGTERM ended
INTERRUPTED = 130  # and for one that Ctrl-C did


def main(argv: list[str]) -> int:
    """The command. Returns the exit code: 0 done, 143 stopped by a signal and saved, 1 failed, 2 refused.

    130, interrupted by a second Ctrl-C, ends the process at once.
    """
    if len(argv) > 1:
        return _refuse(f"unexpected arguments {argv[1:]}: options are written --name=value")
    if _CONFIG.value is None or (_WORKDIR.value is None and not _KEYS.value):
        return _refuse(f"--config and --workdir are needed\n\n{__doc__}")
    import jax

    from regvit_jax import config as configs
    from regvit_jax import train, xla_flags
    from regvit_jax.checkpoint import CheckpointNotSaved
    from regvit_jax.data.workers import WorkersDied
    from regvit_jax.metrics import NonFiniteError
    from regvit_jax.workdir import FULL

    set_up_logging()
    if _KEYS.value:
        print(configs.explain(_CONFIG.value))
        return 0
    several = bool(_DISTRIBUTED.value or _COORDINATOR.value)
    try:
        xla_flags.append(_CONFIG.value.xla_flags, distributed=several)  # before JAX looks for its devices
    except ValueError as error:
        return _refuse(str(error))
    if several:
        jax.distributed.initialize(_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value)
    if jax.process_index():
        logging.getLogger().setLevel(logging.WARNING)
    try:
        result = train.run(_CONFIG.value, _WORKDIR.value)
    except (NonFiniteError, WorkersDied) as error:
        logging.error("%s", error)
        return 1
    except CheckpointNotSaved as error:
        logging.error("%s", error)
        return _leave(1)
    except (ValueError, FileNotFoundError) as error:
        # Refusals speak for themselves; a traceback would bury them. --verbosity=1 shows it.
        logging.debug("refused", exc_info=True)
        return _refuse(str(error))
    except OSError as error:
        if error.errno not in FULL:
            raise
        logging.error(
            "%s: %s. Make room there; the same command then goes on from the newest checkpoint",
            error.filename or _WORKDIR.value,
            error.strerror,
        )
        return _leave(1)
    except KeyboardInterrupt:
        logging.error("interrupted; the same command goes on from the newest checkpoint")
        return _leave(INTERRUPTED)
    return STOPPED if result.stopped else 0


def set_up_logging() -> None:
    """One short line a message, on stderr; the libraries below speak from warnings on."""
    handler = logging.StreamHandler(sys.stderr)
    # What Orbax fails with, it raises as well, and for each array that follows the first one past every `except`.
    handler.addFilter(lambda it: not (it.exc_info and (it.name == "asyncio" or "orbax" in it.pathname)))
    sys.unraisablehook = _unraisable
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    logging.getLogger().handlers[:] = [handler]
    detailed = flags.FLAGS.is_parsed() and flags.FLAGS.verbosity > 0
    logging.getLogger().setLevel(logging.DEBUG if detailed else logging.INFO)
    for name in ("absl", "jax", "orbax", "grain", "tensorflow_datasets", "PIL", "matplotlib"):
        logging.getLogger(name).setLevel(logging.WARNING)


def _unraisable(event) -> None:
    if "Event loop is closed" not in str(event.exc_value):
        sys.__unraisablehook__(event)


def parse_flags(argv: list[str]) -> list[str]:
    """absl's flag parser; a mistyped flag or config key, here or in the config file, is one line and no traceback."""
    if any(arg in ("-h", "--help", "-help") for arg in argv[1:]):
        print(__doc__)
        sys.exit(0)
    try:
        rest = flags.FLAGS(argv)
        if _CONFIG.value is not None:
            _ = _CONFIG.value.recipe  # A file that could not be opened is told on access.
        return rest
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError) as error:
        sys.exit(_refuse(_told(error, argv)))


def _told(error: Exception, argv: list[str]) -> str:
    """An error of parsing in one line: its place in the config file, or the key in full, of which it names a part."""
    inner = error
    while inner.args and isinstance(inner.args[0], Exception):
        inner = inner.args[0]
    text = " ".join(str(inner.args[0] if len(inner.args) == 1 else inner).split())
    near = re.search(r'Did you mean "(\w+)"', text)
    near = f"did you mean {near[1]}? " if near else ""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.name == "get_config"]
    if frames:
        key = re.match(r'Key "(\w+)"', text)
        return f"{frames[-1].filename}, line {frames[-1].lineno}: " + (f"{key[1]} is no key; {near}" if key else text)
    if isinstance(error, OSError):
        return f"--config: {text[text.find('[Errno') :]}"
    word = re.match(r"'(\w+)'", text)
    if word is None or not isinstance(error, AttributeError | KeyError):
        return text
    names = [arg.lstrip("-").partition("=")[0] for arg in argv]
    name = next((n for n in names if n.startswith("config.") and word[1] in n.split(".")), word[1])
    return f"{name} is no key; {near}--keys lists all of them"


def _refuse(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 2


def _leave(code: int) -> int:
    """Ends the process here and now.

    Python's own end waits for the threads of a save that nobody wants any more, or that failed and would say so again.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    app.run(lambda argv: sys.exit(main(argv)), flags_parser=parse_flags)
