"""What stands where in a scene of `scenes:`: solids, camera, light, ground and wall, drawn from one random generator.

World: metres, x right, y up, z away from the viewer; the ground is y = 0. Everything is drawn with `Generator.random`
  and arithmetic that
IEEE rounds the same way everywhere (see scenes_shapes), so equal seeds are equal scenes on any machine.
"""

import dataclasses

import numpy as np

from regvit_jax.data.sources.scenes_shapes import BLOTCHES, CAPSULE, CLASS_NAMES, PATTERN_NAMES

# Raise it with any change that changes a pixel: it is part of every seed and of the name of the prepared folder.
VERSION = 1
SPLITS = ("train", "test")

# A solid fills half its box or less: these keep the eight classes about equally large in the picture.
_WIDTH = ((1.0, 1.0), (0.72, 1.0), (0.62, 0.85), (0.85, 1.05), (0.9, 1.15), (0.85, 1.1), (0.85, 1.1), (0.52, 0.66))
_CONTRAST = 0.3
_LUMA = (0.2126, 0.7152, 0.0722)


@dataclasses.dataclass(frozen=True)
class Solid:
    """One object: class, centre (x, y, z) and half sizes (sx, sy, sz) in metres before the turn around its vertical
    axis."""

    kind: int
    centre: tuple[float, float, float]
    half: tuple[float, float, float]
    turn: tuple[float, float]  # (cos, sin)
    length: float  # of a capsule's straight part, in radii
    colours: tuple[tuple[float, float, float], tuple[float, float, float]]
    frequency: float
    phase: tuple[float, float, float]
    blotches: tuple[tuple[float, float, float, float], ...]

    @property
    def height(self) -> float:
        """Half height in metres."""
        return self.half[1] * (1 + self.length if self.kind == CAPSULE else 1)


@dataclasses.dataclass(frozen=True)
class Backdrop:
    """Ground or wall: colour, and a faint pattern: its kind (0 none, 1 stripes, 2 checks), strength and period in
    metres."""

    colour: tuple[float, float, float]
    kind: int
    strength: float
    period: float


@dataclasses.dataclass(frozen=True)
class Scene:
    """Everything `render` needs.

    `solids[0]` is the main object; `axes` are the camera's right, up and forward; the wall is where
    wall_x * x + wall_z * z = wall_at; `light` points to the light."""

    solids: tuple[Solid, ...]
    eye: tuple[float, float, float]
    axes: tuple[tuple[float, float, float], ...]
    tan_half_fov: float
    ground: Backdrop
    wall: Backdrop
    wall_plane: tuple[float, float, float]
    light: tuple[float, float, float]
    ambient: float
    gain: float
    curve: float
    noise: float

    @property
    def label(self) -> int:
        return self.solids[0].kind


def identity(seed: int, split: str, index: int) -> tuple[int, int, int, int]:
    """The entropy of one scene: no two splits, seeds or indices share it, so no test scene is ever a training scene."""
    return VERSION, seed, SPLITS.index(split), index


def draw(rng: np.random.Generator, label: int) -> Scene:
    """A random scene whose main object is of class `label`.

    The class decides shape, proportions and pattern, and no other draw.
    """
    uniform = _Uniform(rng)
    ground, wall = _backdrop(uniform), _backdrop(uniform)
    main = _solid(uniform, label, uniform(0.45, 0.9), (ground.colour, wall.colour))

    # Apparent size, not distance, is drawn: the main object spans .5 to .75 of the picture.
    tan_half_fov = uniform(0.364, 0.577)
    share = uniform(0.5, 0.75)
    distance = _radius(main) / (share * tan_half_fov)
    rise = uniform(0.03, 0.5)
    eye = (0.0, main.height + distance * rise, 0.0)
    depth = distance * _sqrt(1 - rise * rise)
    main = dataclasses.replace(main, centre=(0.0, main.height, depth))

    jitter = (1 - share) * 0.5 * tan_half_fov * distance
    target = (uniform(-jitter, jitter), main.height + uniform(-jitter, jitter), depth)
    forward = _unit(tuple(a - b for a, b in zip(target, eye, strict=True)))
    right = _unit((forward[2], 0.0, -forward[0]))
    up = _cross(forward, right)

    sine, room = uniform(-0.35, 0.35), uniform(1.6, 6.0)
    cosine = _sqrt(1 - sine * sine)
    wall_plane = (sine, cosine, cosine * (depth + _radius(main) + room))

    solids = [main]
    for _ in range(int(uniform(0, 3))):
        extra = _distractor(
            uniform, solids, wall_plane, share * tan_half_fov, tan_half_fov, room, (ground.colour, wall.colour)
        )
        if extra is not None:
            solids.append(extra)

    height = uniform(0.4, 0.85)
    cos, sin = uniform.turn()
    flat = _sqrt(1 - height * height)
    # From the viewer's side three times in four: the seen faces are then rarely all in their own shade.
    side = -abs(sin) if uniform(0, 1) < 0.75 else sin
    return Scene(
        solids=tuple(solids),
        eye=eye,
        axes=(right, up, forward),
        tan_half_fov=tan_half_fov,
        ground=ground,
        wall=wall,
        wall_plane=wall_plane,
        light=(flat * cos, height, flat * side),
        ambient=uniform(0.25, 0.55),
        gain=uniform(0.85, 1.15),
        curve=uniform(-0.3, 0.3),
        noise=uniform(0.005, 0.03),
    )


def caption(kinds) -> str:
    """What the picture shows, from the classes of its visible objects, the main one first: "a striped cone in front of
    a small
    checkered box"."""
    first, *others = (f"{PATTERN_NAMES[kind]} {CLASS_NAMES[kind]}" for kind in kinds)
    behind = " and ".join(f"a small {other}" for other in others)
    return f"a {first} in front of {behind}" if behind else f"a {first}"


class _Uniform:
    """Python floats, so that they never widen a float32 array."""

    def __init__(self, rng):
        self.rng = rng

    def __call__(self, low, high):
        return low + (high - low) * self.rng.random()

    def turn(self):
        """(cos, sin) of a random angle: a quadrant, and an eighth of a turn either way by its half tangent."""
        t = self(-0.41421356, 0.41421356)
        cos, sin = (1 - t * t) / (1 + t * t), 2 * t / (1 + t * t)
        return ((cos, sin), (-sin, cos), (-cos, -sin), (sin, -cos))[int(self(0, 4))]

    def colour(self):
        return self(0, 1), self(0, 1), self(0, 1)


def _backdrop(uniform):
    value, tint = uniform(0.35, 0.85), uniform(0.1, 0.35)
    colour = tuple(value + tint * (c - 0.5) for c in uniform.colour())
    return Backdrop(colour, int(uniform(0, 3)), uniform(0.01, 0.06), uniform(0.5, 1.4))


def _solid(uniform, kind, height, backdrop_colours):
    """A solid of half height `height` at the origin; its place is filled in by the caller."""
    low, high = _WIDTH[kind]
    wide, deep = low + (high - low) * uniform(0, 1), low + (high - low) * uniform(0, 1)
    half, length = (height * wide, height, height * deep), 0.0
    if kind == CAPSULE:
        half, length = (height * wide,) * 3, 1 / wide - 1
    elif CLASS_NAMES[kind] in ("cylinder", "cone"):
        half = (height * wide, height, height * wide)
    blotches = []
    for _ in range(BLOTCHES):
        radius = uniform(0.22, 0.42)
        blotches.append((uniform(-1, 1), uniform(-1, 1), uniform(-1, 1), radius * radius))
    return Solid(
        kind=kind,
        centre=(0.0, height, 0.0),
        half=half,
        turn=uniform.turn(),
        length=length,
        colours=_colours(uniform, backdrop_colours),
        frequency=uniform(0.85, 1.2),
        phase=uniform.colour(),
        blotches=tuple(blotches),
    )


def _colours(uniform, backdrop_colours):
    """Two colours .3 or more apart in luminance, the first, which a plain solid shows alone, unlike ground and wall."""
    while True:
        first, second = uniform.colour(), uniform.colour()
        apart = min(max(abs(a - b) for a, b in zip(first, other, strict=True)) for other in backdrop_colours)
        if abs(luminance(first) - luminance(second)) >= _CONTRAST and apart >= 0.25:
            return first, second


def luminance(colour) -> float:
    """Rec. 709 luma of an (r, g, b) triple."""
    return sum(weight * value for weight, value in zip(_LUMA, colour, strict=True))


def _distractor(uniform, solids, wall_plane, inner, outer, room, backdrop_colours):
    """A smaller solid on the ground between the main one and the wall, beside the line of sight to it; None if no place
    is found."""
    main = solids[0]
    for _ in range(6):
        kind = int(uniform(0, len(CLASS_NAMES)))
        solid = _solid(uniform, kind, main.height * uniform(0.35, 0.55), backdrop_colours)
        size = _radius(solid)
        z = main.centre[2] + _radius(main) + size + uniform(0.0, 0.6) * room
        x = z * uniform(0.7 * inner, 0.95 * outer) * (1 if uniform(0, 1) < 0.5 else -1)
        free = wall_plane[0] * x + wall_plane[1] * z + size < wall_plane[2]
        for other in solids:
            dx, dz = x - other.centre[0], z - other.centre[2]
            reach = size + _radius(other)
            free &= dx * dx + dz * dz > reach * reach
        if free:
            return dataclasses.replace(solid, centre=(x, solid.height, z))
    return None


def _radius(solid):
    """About how far the solid reaches from its centre, in metres: the mean of half height and the longer half width."""
    return 0.5 * (solid.height + max(solid.half[0], solid.half[2]))


def _sqrt(x):
    return float(np.sqrt(x))


def _unit(v):
    length = _sqrt(v[0] * v[0] + v[1] * v[1] + v[2] * v[2])
    return tuple(a / length for a in v)


def _cross(a, b):
    return a[1] * b[2] - a[2] * b[1], a[2] * b[0] - a[0] * b[2], a[0] * b[1] - a[1] * b[0]
