"""Ten thousand damaged files among as many good ones: every row right, nothing hangs, memory flat."""

import gc
import importlib.util
import os
import pathlib
import time
import warnings

import numpy as np
import pytest

from regvit_jax.data.decode import DecodeError, decode
from regvit_jax.data.loader import eval_batches, train_batches
from regvit_jax.data.transforms import TrainTransform

_spec = importlib.util.spec_from_file_location("damage", pathlib.Path(__file__).with_name("damage.py"))
damage = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(damage)
pytestmark = pytest.mark.soak

GOOD, DAMAGED, BATCH, SEED = 10_000, 10_000, 100, 11
STEPS = (GOOD + DAMAGED) // BATCH  # one pass
TRANSFORM = TrainTransform(damage.SIZE, crop="none")
SLOWEST = 5.0  # seconds for one small file, on a busy machine


def resident() -> float:
    """MiB of this process in memory."""
    gc.collect()
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    start = time.monotonic()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        source, pixels = damage.write(tmp_path_factory.mktemp("soak") / "photos", good=GOOD, damaged=DAMAGED, seed=SEED)
    bad = sum(image is None for image in pixels)
    print(f"\n{len(pixels)} files, {DAMAGED} damaged, {bad} unreadable, in {time.monotonic() - start:.0f} s")
    assert DAMAGED / 2 < bad < DAMAGED
    return source, pixels


def test_no_file_takes_long_and_no_other_error_comes_out(files):
    source, pixels = files
    seconds = []
    for index, image in enumerate(pixels):
        start = time.monotonic()
        try:
            decode(source[index]["image"])
        except (DecodeError, OSError):
            assert image is None, source.name(index)
        else:
            assert image is not None, source.name(index)
        seconds.append(time.monotonic() - start)
    print(f"slowest file {max(seconds):.2f} s, all {sum(seconds):.0f} s")
    assert max(seconds) < SLOWEST


@pytest.mark.parametrize("workers", [0, 2])
def test_every_row_of_training_is_right_and_memory_is_flat(files, workers):
    source, pixels = files
    memory = []
    for turn in range(3):
        start, first = time.monotonic(), turn * STEPS
        batches = train_batches(
            source,
            TRANSFORM,
            seed=SEED,
            batch_size=BATCH,
            start_step=first,
            stop_step=first + STEPS,
            workers=workers,
        )
        count = 0
        for step, batch in enumerate(batches, start=first):
            images, replaced = damage.read_at(pixels, np.arange(step * BATCH, (step + 1) * BATCH), SEED)
            np.testing.assert_array_equal(batch["image"], images)
            np.testing.assert_array_equal(batch["replaced_b"], replaced)
            count += int(replaced.sum())
        memory.append(resident())
        print(
            f"workers={workers} pass {turn}: {count} replaced, {time.monotonic() - start:.0f} s, {memory[-1]:.0f} MiB"
        )
        assert step == first + STEPS - 1 and count == sum(image is None for image in pixels)
    assert memory[-1] - memory[0] < 30


def test_every_good_file_is_evaluated_once(files):
    source, pixels = files
    seen = []
    for batch in eval_batches(source, TRANSFORM, batch_size=BATCH):
        for row in np.flatnonzero(batch["valid_b"]):
            np.testing.assert_array_equal(batch["image"][row], pixels[batch["index"][row]])
        seen += batch["index"][batch["valid_b"]].tolist()
    assert seen == [index for index, image in enumerate(pixels) if image is not None]
