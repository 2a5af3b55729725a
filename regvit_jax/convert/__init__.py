"""Weights of other libraries: one key table a family, read strictly (every key consumed, every parameter filled)."""

from importlib import import_module

FAMILIES = {
    "dinov2": "regvit_jax.convert.dinov2",
    "timm": "regvit_jax.convert.timm",
    "huggingface": "regvit_jax.convert.huggingface",
    "deit3": "regvit_jax.convert.deit",
}


def family_of(name: str):
    """The `Family` registered under a name.

    Raises:
      ValueError: for an unknown name; lists the known ones.
    """
    if name not in FAMILIES:
        raise ValueError(f"unknown weight family {name!r}; known: {', '.join(FAMILIES)}")
    return import_module(FAMILIES[name]).FAMILY
