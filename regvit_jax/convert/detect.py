"""Which family a state dict is of, and why; where keys cannot tell, a question instead of a guess."""

import re
from collections.abc import Collection, Mapping

from regvit_jax.convert import FAMILIES, family_of
from regvit_jax.convert.table import StateDict


def detect(state: StateDict, files: Mapping[str, dict] | None = None, given: Collection[str] = ()) -> tuple[str, str]:
    """The one family that these weights can be of.

    Args:
      state: {key: array}; only names and shapes are looked at.
      files: JSON files beside the weights, by name.
      given: names of fields of ViTConfig that the caller knows.

    Returns:
      (family, why): the reason names what speaks against each other one.

    Raises:
      ValueError: if no family or more than one fits (lists them with what speaks against each, or what they mean), or
        if the keys are known but not what they compute.
    """
    if files and "config.json" in files:
        return _by_config(files["config.json"])
    objections = {name: family_of(name).objections(state, "image_size" in given) for name in FAMILIES}
    candidates = [name for name, against in objections.items() if not against]
    if not candidates:
        raise ValueError(_none_of_them(state, objections))
    if len(candidates) > 1:
        meanings = "; ".join(f"{name}: {family_of(name).means}" for name in candidates)
        raise ValueError(
            f"these keys fit several families ({', '.join(candidates)}): pass family= (--family=). {meanings}"
        )
    if candidates == ["huggingface"] and "num_heads" not in given:
        raise ValueError(
            "these are Hugging Face's keys, but without config.json nothing tells the head count and the activation: "
            "pass family='huggingface' (head count by width, exact GELU) or num_heads="
        )
    others = "; ".join(f"not {name}: {against[0]}" for name, against in objections.items() if against)
    return candidates[0], f"its table explains all {len(state)} keys ({others})"


def _by_config(said: dict) -> tuple[str, str]:
    if "model_type" in said:
        kind = said["model_type"]
        if kind in ("dinov2", "dinov2_with_registers"):
            return "huggingface", f"config.json has model_type {kind}"
        raise ValueError(f"config.json has model_type {kind!r}; known: dinov2, dinov2_with_registers")
    if "architecture" in said:
        return "timm", f"config.json has timm's architecture {said['architecture']}"
    raise ValueError("config.json has neither model_type (Hugging Face) nor architecture (timm): pass family=")


def _none_of_them(state: StateDict, objections: Mapping[str, list[str]]) -> str:
    if set(state) == {"weight", "bias"} or any(key.startswith("decode_head.") for key in state):
        return (
            "these keys are a head without its network: regvit_jax.convert.heads reads them, and a linear classifier "
            "joins its network by rv.load_model(network, head=file)"
        )
    for name in objections:
        for pattern, what in family_of(name).refused:
            if matching := [key for key in state if re.search(pattern, key)]:
                return f"these keys fit none of the families {', '.join(FAMILIES)}: {matching[0]} is of {what}"
    nearest = min(objections, key=lambda name: len(family_of(name).unexplained(state)))
    against = "; ".join(f"{name}: {', '.join(found)}" for name, found in objections.items())
    return f"these keys fit none of the families {', '.join(FAMILIES)}; nearest is {nearest}. {against}"
