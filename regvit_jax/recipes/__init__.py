"""Recipes: one training method a file. A new one is a file and a line of `RECIPES`."""

from importlib import import_module

RECIPES = {
    "dinov2": "regvit_jax.recipes.dinov2:DINOv2",
    "supervised": "regvit_jax.recipes.supervised:Supervised",
}


def get(name: str) -> type:
    """The recipe class registered under a name.

    Raises:
      ValueError: for an unknown name; lists the known ones.
    """
    if name not in RECIPES:
        raise ValueError(f"unknown recipe {name!r}; known: {', '.join(RECIPES)}")
    module, attribute = RECIPES[name].split(":")
    return getattr(import_module(module), attribute)
