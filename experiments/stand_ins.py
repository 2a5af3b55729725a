"""Networks so small that a whole table takes seconds: freshly initialised, with and without registers."""

import pathlib

import regvit_jax as rv

REGISTERS = (0, 4)
SHAPE = dict(width=32, depth=4, num_heads=2, mlp_dim=64, image_size=32, patch_size=8)


def models(folder: pathlib.Path) -> dict[str, str]:
    """{name: folder}, made where they are not there."""
    made = {}
    for registers in REGISTERS:
        name = f"tiny_reg{registers}"
        place = folder / name
        if not (place / "model.json").is_file():
            rv.save_model(rv.create_model(f"vit_ti8_reg{registers}", seed=registers, **SHAPE), place)
        made[name] = str(place)
    return made
