"""Tests of recipes compile many small programs and run each once: compiling them well would take most of the time."""

import pytest


@pytest.fixture(scope="package", autouse=True)
def quick():
    import jax  # Not above: this file may be loaded before tests/conftest.py asks for fake devices.

    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
