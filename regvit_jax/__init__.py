"""regvit_jax: Vision Transformers with registers, in JAX. The public face; nothing is imported before it is used.

import regvit_jax as rv
model = rv.create_model("vit_s14_reg4", image_size=224)
tokens = model(model.preprocess(["photo.jpg"]))     # Tokens(cls, registers, patches, grid)
"""

from importlib import import_module, metadata

_HOME = {
    "Model": "regvit_jax.models.model",
    "Tokens": "regvit_jax.models.vit",
    "ViTConfig": "regvit_jax.models.config",
    "create_model": "regvit_jax.models.zoo",
    "discover": "regvit_jax.ops.lost",
    "export_model": "regvit_jax.convert.export",
    "from_torch": "regvit_jax.hub",
    "intermediate": "regvit_jax.models.model",
    "list_models": "regvit_jax.models.zoo",
    "load_model": "regvit_jax.hub",
    "save_model": "regvit_jax.hub",
    "to_torch": "regvit_jax.hub",
}

__all__ = sorted(_HOME)


def __getattr__(name: str):
    if name == "__version__":
        return metadata.version("regvit_jax")
    if name not in _HOME:
        raise AttributeError(f"module 'regvit_jax' has no attribute {name!r}; it offers {', '.join(__all__)}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
