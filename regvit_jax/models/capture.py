"""Names of what a forward pass can return beside its tokens, and how they map to blocks.

embed                        (B, N, D)       tokens entering block 0
block3                       (B, N, D)       residual stream after block 3, before the final norm; block-1 is the last
block3/q  /k  /v             (B, N, H, K)
block3/mlp                   (B, N, mlp_dim) hidden units after the activation
block3/attn                  (B, H, N, N)    attention after the softmax, float32
block3/attn[cls,registers]   (B, H, Q, N)    the same for chosen queries: cls, registers, patches, or token positions
"""

import dataclasses
import re

from regvit_jax.models.config import ViTConfig

_NAME = re.compile(r"block(-?\d+)(?:/(q|k|v|mlp|attn)(?:\[([^\]]*)\])?)?")


@dataclasses.dataclass(frozen=True)
class Capture:
    """One thing asked for: `name` as the caller wrote it, the block (-1: embed), what of it, and which queries."""

    name: str
    block: int
    what: str
    rows: tuple[int, ...] | None = None

    @property
    def inner(self) -> tuple[str, tuple[int, ...] | None]:
        return self.what, self.rows

    def pick(self, found: dict):
        return found[self.inner] if self.what == "attn" else found[self.what]


def parse(names: tuple[str, ...], config: ViTConfig, tokens: int) -> list[Capture]:
    """The captures of a sequence of `tokens` tokens.

    Raises:
      ValueError: for a name that means nothing, a block that does not exist, or a token that is not there.
    """
    return [_parse(name, config, tokens) for name in names]


def _parse(name: str, config: ViTConfig, tokens: int) -> Capture:
    if name == "embed":
        return Capture(name, -1, "residual")
    match = _NAME.fullmatch(name)
    if match is None or (match[3] is not None and match[2] != "attn"):
        raise ValueError(
            f"capture {name!r} is not known; examples: embed, block3, block-1/q, block3/mlp, block3/attn[cls]"
        )
    block = int(match[1])
    if not -config.depth <= block < config.depth:
        raise ValueError(f"capture {name!r}: the model has blocks 0 to {config.depth - 1}")
    rows = None if match[3] is None else _rows(name, match[3], config, tokens)
    return Capture(name, block % config.depth, match[2] or "residual", rows)


def _rows(name: str, text: str, config: ViTConfig, tokens: int) -> tuple[int, ...]:
    cls, prefix = int(config.class_token), config.prefix
    groups = {"cls": range(cls), "registers": range(cls, prefix), "patches": range(prefix, tokens)}
    rows: list[int] = []
    for part in filter(None, (p.strip() for p in text.split(","))):
        if part in groups:
            rows.extend(groups[part])
        elif re.fullmatch(r"-?\d+", part) and -tokens <= int(part) < tokens:
            rows.append(int(part) % tokens)
        else:
            raise ValueError(
                f"capture {name!r}: {part!r} is neither cls, registers, patches nor a position below {tokens}"
            )
    if not rows:
        raise ValueError(f"capture {name!r} selects no query: this model has no such tokens")
    return tuple(rows)
