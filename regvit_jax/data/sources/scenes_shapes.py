"""The eight solids of `scenes:`: where a ray meets each, and the two-coloured pattern on its surface.

A solid lives in its own frame, where it fills [-1, 1]^3 and y is up. Points, directions and normals are triples of
float32 arrays (x, y, z). Only + - * / sqrt, floor and comparisons touch them: IEEE arithmetic rounds these the same way
everywhere, so a scene is the same bytes on every machine, which sin, exp or a matrix product would not promise.
"""

import numpy as np

CLASS_NAMES = ("sphere", "box", "cylinder", "cone", "pyramid", "prism", "octahedron", "capsule")
SPHERE, BOX, CYLINDER, CONE, PYRAMID, PRISM, OCTAHEDRON, CAPSULE = range(8)
# What the surface of each class looks like, as a caption says it.
PATTERN_NAMES = ("plain", "checkered", "ribbed", "striped", "dotted", "blotched", "diagonally striped", "tiled")
BLOTCHES = 14

_FAR = np.float32(1e9)
_TINY = np.float32(1e-12)
_ZERO, _ONE = np.float32(0), np.float32(1)

# Half spaces n . p <= h whose common part is the solid, rows (nx, ny, nz, h).
_PLANES = {
    BOX: ((1, 0, 0, 1), (-1, 0, 0, 1), (0, 1, 0, 1), (0, -1, 0, 1), (0, 0, 1, 1), (0, 0, -1, 1)),
    PYRAMID: ((2, 1, 0, 1), (-2, 1, 0, 1), (0, 1, 2, 1), (0, 1, -2, 1), (0, -1, 0, 1)),
    PRISM: ((2, 1, 0, 1), (-2, 1, 0, 1), (0, -1, 0, 1), (0, 0, 1, 1), (0, 0, -1, 1)),
    OCTAHEDRON: tuple((x, y, z, 1) for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)),
}
_SLAB = ((0, 1, 0, 1), (0, -1, 0, 1))
_CONE_CAP = ((0, -1, 0, 1),)

# (cos, sin) of j * 36 degrees: five planes through the axis cut a solid of revolution into ten wedges.
_FIFTHS = ((1.0, 0.0), (0.809017, 0.587785), (0.309017, 0.951057), (-0.309017, 0.951057), (-0.809017, 0.587785))


def intersect(kind, origin, rays, length):
    """First hit of `rays` from outside with the solid of class `kind`.

    Args:
      kind: class index.
      origin: (x, y, z) floats, the eye.
      rays: triple of (n,) float32 directions, of any length.
      length: half length of a capsule's straight part, in units of its radius; other solids do not read it.

    Returns:
      t (n,): distance in units of the ray's length, 1e9 where it misses; `normals`, a function that takes the indices
      of hits and returns their outward normals, a triple of float32 arrays, not normalised.
    """
    if kind == SPHERE:
        t, _ = _ball(origin, rays, 0.0)
        return t, lambda hits: _points(origin, rays, t, hits)
    if kind == CAPSULE:
        return _capsule(origin, rays, length)
    if kind in _PLANES:
        entry, leave, face = _between_planes(_PLANES[kind], origin, rays)
        table = np.array(_PLANES[kind], np.float32)[:, :3]
        return _first(entry, leave), lambda hits: tuple(table[face[hits]].T)
    return _cylinder(origin, rays) if kind == CYLINDER else _cone(origin, rays)


def pattern(kind, points, normals, scale, frequency, phase, blotches):
    """True where a surface point has the second colour.

    Args:
      kind: class index; it decides the pattern.
      points, normals: triples of (n,) float32 arrays in the solid's frame.
      scale: (sx, sy, sz), half sizes of the solid in units of its half height: patterns keep their proportions when it
        is stretched.
      frequency: about 1; higher is finer.
      phase: three floats in [0, 1).
      blotches: BLOTCHES rows (x, y, z, squared radius) in the scaled frame.

    Returns:
      (n,) bool.
    """
    # A hair inside the surface: no face then lies exactly on a border of the pattern, where rounding would speckle it.
    x, y, z = (p * (0.97 * s) for p, s in zip(points, scale, strict=True))
    if kind == SPHERE:
        return np.zeros(x.shape, bool)
    if kind == BOX:
        k = 1.7 * frequency
        return _odd(np.floor(x * k + phase[0]) + np.floor(y * k + phase[1]) + np.floor(z * k + phase[2]))
    if kind == CYLINDER:
        return _odd(_wedges(x, z))
    if kind == CONE:
        return _odd(np.floor(y * (3.2 * frequency) + phase[0]))
    if kind == PYRAMID:
        across = np.where(np.abs(normals[0]) > np.abs(normals[2]), z, x)
        row = y * (2.4 * frequency) + phase[1]
        # Every other row is shifted by half a step, as dots on cloth are.
        column = across * (2.4 * frequency) + phase[0] + np.float32(0.5) * _odd(np.floor(row))
        row, column = row - np.floor(row) - 0.5, column - np.floor(column) - 0.5
        return row * row + column * column < 0.105
    if kind == PRISM:
        covered = np.zeros(x.shape, bool)
        for bx, by, bz, r2 in blotches:
            dx, dy, dz = x - bx, y - by, z - bz
            covered |= dx * dx + dy * dy + dz * dz < r2
        return covered
    if kind == OCTAHEDRON:
        return _odd(np.floor((x + 1.25 * y + 0.4 * z) * (2.5 * frequency) + phase[0]))
    row = y * (2.3 * frequency) + phase[0]
    fraction = row - np.floor(row)
    # Joints of every other row sit half a wedge further: the planes at multiples of 36 degrees, or those between.
    shifted = _odd(np.floor(row))
    a, b = np.where(shifted, np.float32(0.951057), _ONE), np.where(shifted, np.float32(0.309017), _ZERO)
    along, across = a * x - b * z, b * x + a * z
    joint = np.zeros(x.shape, bool)
    for c, s in _FIFTHS:
        joint |= np.abs(s * along - c * across) < 0.05
    return joint | (fraction < 0.2)


def _odd(integers):
    half = integers * 0.5
    return half != np.floor(half)


def _wedges(x, z):
    """Number of the wedge around the y axis, odd and even in turn (the parity is what counts)."""
    count = np.zeros(x.shape, np.float32)
    for c, s in _FIFTHS:
        count += s * x > c * z
    return count


def _points(origin, rays, t, hits):
    return tuple(o + t[hits] * d[hits] for o, d in zip(origin, rays, strict=True))


def _first(entry, leave):
    return np.where((entry < leave) & (entry > 0), entry, _FAR)


def _between_planes(planes, origin, rays):
    """Interval of t inside all half spaces and the number of the plane through which the ray comes in."""
    entry, leave = np.full(rays[0].shape, -_FAR), np.full(rays[0].shape, _FAR)
    face = np.zeros(rays[0].shape, np.int8)
    for number, (nx, ny, nz, h) in enumerate(planes):
        along = sum(n * d for n, d in zip((nx, ny, nz), rays, strict=True) if n)
        room = h - (nx * origin[0] + ny * origin[1] + nz * origin[2])
        t = room / np.where(np.abs(along) < _TINY, _TINY, along)
        enters = along < 0
        later = enters & (t > entry)
        entry = np.where(later, t, entry)
        face = np.where(later, np.int8(number), face)
        leave = np.where(enters, leave, np.minimum(leave, t))
    return entry, leave, face


def _roots(a, b, c):
    """Both roots of a t^2 + 2 b t + c for a > 0, and whether they are real."""
    square = b * b - a * c
    real = square > 0
    root = np.sqrt(np.where(real, square, 0.0))
    a = np.maximum(a, _TINY)
    return (-b - root) / a, (-b + root) / a, real


def _ball(origin, rays, height):
    """t of the unit ball around (0, height, 0)."""
    ox, oy, oz = origin[0], origin[1] - height, origin[2]
    dx, dy, dz = rays
    t, leave, real = _roots(dx * dx + dy * dy + dz * dz, dx * ox + dy * oy + dz * oz, ox * ox + oy * oy + oz * oz - 1.0)
    return np.where(real & (t > 0), t, _FAR), leave


def _tube(origin, rays):
    ox, _, oz = origin
    dx, _, dz = rays
    return _roots(dx * dx + dz * dz, dx * ox + dz * oz, ox * ox + oz * oz - 1.0)


def _cylinder(origin, rays):
    entry, leave, real = _tube(origin, rays)
    top, bottom, _ = _between_planes(_SLAB, origin, rays)
    t = np.where(real, _first(np.maximum(entry, top), np.minimum(leave, bottom)), _FAR)

    def normals(hits):
        x, y, z = _points(origin, rays, t, hits)
        cap = top[hits] > entry[hits]
        return (
            np.where(cap, 0.0, x),
            np.where(cap, np.where(y > 0, 1.0, -1.0), 0.0).astype(np.float32),
            np.where(cap, 0.0, z),
        )

    return t, normals


def _cone(origin, rays):
    # x^2 + z^2 = w^2 with w = (1 - y) / 2, the radius at height y: the apex is at y = 1.
    ox, oz, ow = origin[0], origin[2], (1.0 - origin[1]) / 2
    dx, dz, dw = rays[0], rays[2], rays[1] * -0.5
    a, b, c = dx * dx + dz * dz - dw * dw, dx * ox + dz * oz - dw * ow, ox * ox + oz * oz - ow * ow
    base, _, _ = _between_planes(_CONE_CAP, origin, rays)
    square = b * b - a * c
    root = np.sqrt(np.maximum(square, 0.0))
    a = np.where(np.abs(a) < _TINY, _TINY, a)
    side = np.full(a.shape, _FAR)
    for t in ((-b - root) / a, (-b + root) / a):
        y = origin[1] + t * rays[1]
        side = np.where((square > 0) & (t > 0) & (np.abs(y) <= 1), np.minimum(side, t), side)
    floor = np.where((base > 0) & (rays[1] > 0), base, _FAR)
    x, z = ox + floor * dx, oz + floor * dz
    floor = np.where(x * x + z * z <= 1, floor, _FAR)
    t = np.minimum(side, floor)

    def normals(hits):
        x, y, z = _points(origin, rays, t, hits)
        below = floor[hits] < side[hits]
        return (
            np.where(below, 0.0, x),
            np.where(below, -1.0, (1 - y) * 0.25).astype(np.float32),
            np.where(below, 0.0, z),
        )

    return t, normals


def _capsule(origin, rays, length):
    tube, _, real = _tube(origin, rays)
    y = origin[1] + tube * rays[1]
    best = np.where(real & (tube > 0) & (np.abs(y) <= length), tube, _FAR)
    for height in (-length, length):
        best = np.minimum(best, _ball(origin, rays, height)[0])

    def normals(hits):
        x, y, z = _points(origin, rays, best, hits)
        return x, y - np.minimum(np.maximum(y, -length), length), z

    return best, normals
