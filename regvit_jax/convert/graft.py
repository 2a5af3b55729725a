"""Loaded weights changed on purpose: registers added to a network that has none, positions resampled to another size.

Every change is a sentence for the log and the certificate.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np

from regvit_jax.models.model import Model
from regvit_jax.models.posembed import resample


def add_registers(model: Model, registers: int, seed: int = 0) -> tuple[Model, list[str]]:
    """The model with so many registers: freshly initialised where it has none, itself where it has as many.

    They get no position. With them the network is not the one it was: they want training (or leave its outputs
    disturbed, a little at the usual 1e-6).

    Args:
      model: any Model.
      registers: how many are wanted.
      seed: of N(0, config.token_init_std), NumPy's generator.

    Raises:
      ValueError: if the model has another number of registers than none or `registers`.
    """
    config = model.config
    if registers == config.registers:
        return model, []
    if config.registers:
        raise ValueError(
            f"the weights have {config.registers} registers, {registers} were asked for: trained registers are neither "
            f"dropped nor added to; leave registers out, or give {config.registers}"
        )
    if registers < 0:
        raise ValueError(f"registers must be 0 or more, got {registers}")
    position = config.position
    if position == "all":  # The same rows; the new registers are to have none.
        position = "cls" if config.class_token else "patches"
    std, shape = config.token_init_std, (1, registers, config.width)
    tokens = (std * np.random.default_rng(seed).normal(size=shape)).astype(np.float32)
    note = f"{registers} registers were added, freshly initialised (standard deviation {std:g}, seed {seed})"
    return dataclasses.replace(
        model,
        params=dict(model.params) | {"register_tokens": jnp.asarray(tokens)},
        config=dataclasses.replace(config, registers=registers, position=position),
    ), [note]


def resize(model: Model, image_size: int | tuple[int, int]) -> tuple[Model, list[str]]:
    """The model with another native image size: position rows resampled once, preprocessing in step.

    At `image_size` the outputs are those of the model before; at other sizes rows are resampled from the new grid.

    Args:
      model: any Model.
      image_size: side or (height, width) in pixels, multiples of the patch.

    Raises:
      ValueError: if it is no multiple of the patch.
    """
    config = model.config
    size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    grid = config.grid_of(size)
    look = dataclasses.replace(model.preprocessing, size=min(size))
    new = dataclasses.replace(config, image_size=size)
    params, notes = dict(model.params), []
    if grid != config.grid and config.position != "none":
        rows, first = params["pos_embed"], config.position_prefix
        native = rows[0, first:].reshape(*config.grid, -1)
        patches = resample(native, grid, config.resampler).reshape(1, -1, config.width)
        params["pos_embed"] = jnp.concatenate([rows[:, :first], patches.astype(rows.dtype)], axis=1)
        (h0, w0), (h, w) = config.grid, grid
        notes.append(f"positions were resampled from {h0} x {w0} to {h} x {w} patches ({config.resampler})")
    return dataclasses.replace(model, params=params, config=new, preprocessing=look), notes
