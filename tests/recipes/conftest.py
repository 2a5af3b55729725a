"""Tests of recipes compile many small programs and run each once: compiling them well would take most of the time."""

import pytest


@pytest.fixture(scope="package", autouse=True)
def quick(compiling_fast):
    with compiling_fast():
        yield
