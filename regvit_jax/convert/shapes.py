"""What the shapes of parameters say about the architecture."""

from collections.abc import Mapping

from regvit_jax.models.zoo import SIZES

Shapes = Mapping[str, tuple[int, ...]]


class PositionError(ValueError):
    """Position rows leave the native grid open."""


HEADS = {width: heads for width, _, heads in SIZES.values()}


def config_fields(
    family: str, shapes: Shapes, positions: tuple[str, ...], heads: Mapping[int, int], given: dict
) -> dict:
    """The fields of ViTConfig that shapes decide.

    Args:
      family: its name, for messages.
      shapes: of our parameters, by name.
      positions: conventions of position rows that the family uses.
      heads: {width: head count} of its usual sizes.
      given: fields known otherwise; num_heads and image_size are looked at.

    Raises:
      ValueError: if this is no Vision Transformer, no convention of position rows fits, or the head count is unknown.
    """
    for name in ("patch_embed/kernel", "blocks/mlp/fc1/kernel", "blocks/mlp/fc2/kernel"):
        if name not in shapes:
            raise ValueError(f"{family}: the state dict has no {name}: this is not a Vision Transformer of this family")
    patch_rows, width = shapes["patch_embed/kernel"]
    depth, mlp_dim, _ = shapes["blocks/mlp/fc2/kernel"]
    registers = shapes["register_tokens"][1] if "register_tokens" in shapes else 0
    class_token = "cls_token" in shapes
    patch_size = int(round((patch_rows / 3) ** 0.5))
    size = given["image_size"] if "image_size" in given else None
    if "pos_embed" in shapes:
        grid = None if size is None else _grid(size, patch_size)
        position, grid = _position(family, shapes["pos_embed"][1], class_token, registers, positions, grid)
        size = (grid[0] * patch_size, grid[1] * patch_size)
    elif "none" not in positions:
        raise ValueError(f"{family}: the state dict has no position rows")
    elif size is None:
        raise ValueError(f"{family}: without position rows nothing tells the native image size: pass image_size=")
    else:
        position = "none"
    if width not in heads and "num_heads" not in given:
        raise ValueError(
            f"{family}: width {width} is not a standard one and a state dict does not hold the head count: pass "
            "num_heads="
        )
    head_rows = shapes["head/kernel"][0] if "head/kernel" in shapes else width
    return {
        "width": width,
        "depth": depth,
        "num_heads": heads[width] if width in heads else given["num_heads"],
        "mlp_dim": mlp_dim,
        "activation": "swiglu" if shapes["blocks/mlp/fc1/kernel"][-1] == 2 * mlp_dim else "gelu",
        "patch_size": patch_size,
        "image_size": size,
        "registers": registers,
        "class_token": class_token,
        "position": position,
        "layerscale": 1.0 if "blocks/ls1/gamma" in shapes else None,
        "pre_norm": "pre_norm/scale" in shapes,
        "patch_bias": "patch_embed/bias" in shapes,
        "qkv_bias": "blocks/attn/qkv/bias" in shapes,
        "mask_token": "mask_token" in shapes,
        "final_norm": "norm/scale" in shapes,
        "fc_norm": "fc_norm/scale" in shapes,
        "num_classes": shapes["head/kernel"][1] if "head/kernel" in shapes else 0,
        "pool": "token_avg" if head_rows == 2 * width else "token" if class_token else "avg",
    }


def readings(
    rows: int,
    class_token: bool,
    registers: int,
    positions: tuple[str, ...],
    grid: tuple[int, int] | None = None,
) -> list[tuple[str, tuple[int, int]]]:
    """Every way in which position rows can belong to tokens: (convention, native grid of patches).

    Args:
      rows: how many there are.
      positions: the conventions that come into question.
      grid: (h, w) where it is known; None: a square.
    """
    prefixes = {"patches": 0, "cls": 1, "all": int(class_token) + registers}
    out: dict[tuple[str, tuple[int, int]], None] = {}
    for position in positions:
        if position not in prefixes or (position == "cls" and not class_token):
            continue
        left = rows - prefixes[position]
        side = int(round(max(left, 0) ** 0.5))
        found = grid or (side, side)
        if left <= 0 or found[0] * found[1] != left:
            continue
        if position == "all" and not registers:  # One thing has one name.
            position = "cls" if class_token else "patches"
        out[position, found] = None
    return list(out)


def _position(
    family: str, rows: int, class_token: bool, registers: int, positions: tuple[str, ...], grid: tuple[int, int] | None
) -> tuple[str, tuple[int, int]]:
    """The one reading of position rows.

    Raises:
      PositionError: if there is none, or more than one.
    """
    found = readings(rows, class_token, registers, positions, grid)
    if len(found) == 1:
        return found[0]
    tokens = f"{'a' if class_token else 'no'} class token, {registers} registers"
    if found:
        ways = " or ".join(f"{name} with a grid of {h} x {w}" for name, (h, w) in found)
        raise PositionError(f"{family}: {rows} position rows can mean {ways} ({tokens}): pass image_size=")
    wanted = f"grid of {grid[0]} x {grid[1]}" if grid else "square grid"
    raise PositionError(
        f"{family}: {rows} position rows leave no {wanted} of patches ({' or '.join(positions)}; {tokens}); "
        "a native grid that is no square is given by image_size=(height, width)"
    )


def _grid(size: int | tuple[int, int], patch_size: int) -> tuple[int, int]:
    height, width = (size, size) if isinstance(size, int) else size
    return height // patch_size, width // patch_size
