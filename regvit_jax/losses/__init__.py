"""Losses: pure functions of arrays, computed in float32. A new one is a function in a file here and a line in _EXPORTS.

Names resolve on first use, so that importing one loss does not import all.
"""

import importlib

_EXPORTS = {
    "bce": "classification",
    "centered_softmax": "sinkhorn",
    "dino_loss": "dino",
    "ibot_loss": "ibot",
    "koleo_loss": "koleo",
    "log_gradient_loss": "depth",
    "one_hot": "classification",
    "sig_loss": "depth",
    "sinkhorn_knopp": "sinkhorn",
    "softmax_xent": "classification",
    "top_k_correct": "classification",
    "update_center": "sinkhorn",
}

__all__ = sorted(_EXPORTS)


def __getattr__(name: str):
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; there are {', '.join(__all__)}")
    value = getattr(importlib.import_module(f"{__name__}.{_EXPORTS[name]}"), name)
    globals()[name] = value
    return value


def __dir__():
    return sorted({*globals(), *_EXPORTS})
