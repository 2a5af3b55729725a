"""Tiny networks whose every parameter is random, made without compiling an initialisation.

Imports of the package wait until a test asks: pytest may load this file before ../conftest.py has set up JAX.
"""

import numpy as np
import pytest

BASE = {"width": 16, "depth": 3, "num_heads": 2, "mlp_dim": 12, "patch_size": 4, "image_size": (12, 8), "registers": 2}


def _tiny(run=None, seed=0, **changes):
    import jax.numpy as jnp

    from regvit_jax.models.config import Execution, ViTConfig
    from regvit_jax.models.model import Model, abstract_params
    from regvit_jax.trees import map_named

    config, rng = ViTConfig(**(BASE | changes)), np.random.default_rng(seed)

    def draw(path, leaf):
        # Fresh parameters are nearly zero and hide mistakes; of these, every bias, gain and token matters.
        return jnp.asarray(float(path.endswith("scale")) + 0.3 * rng.normal(size=leaf.shape), jnp.float32)

    return Model(map_named(draw, abstract_params(config)), config, run or Execution())


@pytest.fixture(scope="session")
def tiny():
    """tiny(run=None, seed=0, **fields of ViTConfig) -> Model, 3 blocks of width 16 on a 3 x 2 grid."""
    return _tiny


@pytest.fixture(scope="session")
def images():
    """(2, 12, 8, 3) float32."""
    return np.random.default_rng(1).normal(size=(2, 12, 8, 3)).astype(np.float32)
