"""What is wrong with a state dict, in words: the keys, the nearest that would be right, the shapes."""

import difflib
import re
from collections.abc import Iterable, Sequence

from regvit_jax.convert.rows import Row
from regvit_jax.convert.shapes import Shapes
from regvit_jax.models.config import ViTConfig
from regvit_jax.models.model import abstract_params
from regvit_jax.trees import named


def unknown_keys(leftover: Sequence[str], known: Iterable[str], refused: Iterable[tuple[str, str]]) -> str:
    """About keys that no row consumes: what they belong to if that is known, else what they are near to."""
    for pattern, what in refused:
        if matching := [key for key in leftover if re.search(pattern, key)]:
            return f"{matching[0]} is of a network with {what}"
    ordered = sorted(known)
    lines = []
    for key in leftover[:8]:
        near = difflib.get_close_matches(key, ordered, n=1)
        lines.append(f"{key} (nearest: {near[0]})" if near else key)
    return f"{len(leftover)} keys are not part of this family: {', '.join(lines)}"


def misfits(config: ViTConfig, shapes: Shapes, rows: Iterable[Row], keys: Iterable[str]) -> list[str]:
    """Parameters that are not filled, have no place, or another shape than the architecture asks for."""
    wanted = {name: leaf.shape for name, leaf in named(abstract_params(config)).items()}
    problems = []
    for name in sorted(wanted.keys() - shapes.keys()):
        sources = [source for row in rows if row.target == name for source in row.sources]
        near = difflib.get_close_matches(sources[0].format(i=0), list(keys), n=2) if sources else []
        problems.append(
            f"{name} is not filled (expected from {sources or 'no key of this family'}; nearest keys: {near})"
        )
    problems += [f"{name} has no place in this architecture" for name in sorted(shapes.keys() - wanted.keys())]
    problems += [
        f"{name} is {shapes[name]}, expected {wanted[name]}"
        for name in sorted(wanted.keys() & shapes.keys())
        if wanted[name] != shapes[name]
    ]
    return problems
