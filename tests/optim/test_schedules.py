"""Schedules: values by hand and from published runs, edges."""

import logging

import jax
import numpy as np
import pytest

from regvit_jax.optim import schedule


def values(fn, *steps):
    return [float(jax.jit(fn)(step)) for step in steps]


def test_cosine_with_warmup_by_hand():
    fn = schedule("cosine", 8.0, 13, 5, end=2.0)
    assert values(fn, 0, 1, 2, 4, 5) == [0.0, 2.0, 4.0, 8.0, 8.0]
    assert values(fn, 9, 13, 99) == pytest.approx([5.0, 2.0, 2.0], abs=1e-6)
    # The last update of the run, step T - 1, is one eighth of the way short of the end.
    assert values(fn, 12)[0] == pytest.approx(2.0 + 3.0 * (1 + np.cos(np.pi * 7 / 8)), rel=1e-5)


def test_linear_and_constant_by_hand():
    assert values(schedule("linear", 8.0, 6, 2, end=4.0), 0, 1, 2, 4, 5, 6) == [0.0, 8.0, 8.0, 6.0, 5.0, 4.0]
    assert values(schedule("constant", 8.0, 6, 0, end=4.0), 0, 5, 99) == [8.0, 8.0, 8.0]


def test_published_dinov2_values():
    lr = schedule("cosine", 4e-3 * 2**0.5, 125_000, 12_500, end=1e-6)
    assert values(lr, 12_499, 12_500) == pytest.approx([5.656854e-3] * 2, rel=1e-6)
    assert values(lr, 124_999)[0] == pytest.approx(1e-6, rel=1e-4)
    assert values(schedule("cosine", 0.992, 125_000, 0, end=1.0), 0, 62_500) == pytest.approx([0.992, 0.996], rel=1e-6)
    temperature = schedule("constant", 0.07, 625_000, 37_500, start=0.04)
    assert values(temperature, 0, 37_499, 600_000) == pytest.approx([0.04, 0.07, 0.07], rel=1e-6)


def test_openclip_warmup_is_a_start_above_zero():
    fn = schedule("cosine", 5e-4, 10_000, 2000, start=5e-4 / 2000)
    assert values(fn, 0, 99, 1999, 6000) == pytest.approx([2.5e-7, 2.5e-5, 5e-4, 2.5e-4], rel=1e-5)


def test_a_warmup_longer_than_the_run_is_clipped_with_a_warning(caplog):
    with caplog.at_level(logging.WARNING):
        fn = schedule("cosine", 3.0, 4, 1000)
    assert "1000 steps is clipped to the 4 steps" in caplog.text
    assert values(fn, 0, 1, 3) == [0.0, 1.0, 3.0]


def test_schedules_refuse_what_has_no_meaning():
    with pytest.raises(ValueError, match="choose one of cosine"):
        schedule("step", 1.0, 10, 0)
    with pytest.raises(ValueError, match="total_steps >= 1"):
        schedule("cosine", 1.0, 0, 0)
