"""Weights of other libraries: one key table a family, strict in both directions (every key consumed or knowingly
dropped, every parameter filled)."""

from importlib import import_module

FAMILIES = {
    "dinov2": "regvit_jax.convert.dinov2",
    "timm": "regvit_jax.convert.timm",
    "huggingface": "regvit_jax.convert.huggingface",
    "deit3": "regvit_jax.convert.deit",
    "dino": "regvit_jax.convert.dino",
}


def family_of(name: str):
    """The `Family` registered under a name.

    Raises:
      ValueError: for an unknown name; lists the known ones.
    """
    if name not in FAMILIES:
        raise ValueError(f"unknown weight family {name!r}; known: {', '.join(FAMILIES)}")
    return import_module(FAMILIES[name]).FAMILY
