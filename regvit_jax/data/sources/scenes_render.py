"""The camera of `scenes:`: image, mask, depth and boxes of one scene by NumPy ray casting, 2 x 2 rays a pixel.

Rays are (right * u + up * v + forward), not normalised, so the ray parameter t is the metric depth along the view axis.
"""

import dataclasses

import numpy as np

from regvit_jax.data.sources import scenes_layout as layout
from regvit_jax.data.sources import scenes_shapes as shapes

GROUND, WALL, FIRST_CLASS = 0, 1, 2
MASK_NAMES = ("ground", "wall", *shapes.CLASS_NAMES)
# An object is named and boxed when it covers this share of the picture: 12 pixels of 64 x 64.
_VISIBLE = 0.003
_MAIN = 2  # number of the first solid in the instance map, after ground and wall


@dataclasses.dataclass(frozen=True)
class Picture:
    """One rendered scene of S x S pixels.

    Attributes:
      image: (S, S, 3) uint8.
      label: class of the main object.
      mask: (S, S) uint8: 0 ground, 1 wall, 2 + class on objects.
      depth_mm: (S, S) uint16, depth along the view axis in millimetres.
      boxes: (K, 4) float32 pixel boxes x0 y0 x1 y1 (x1, y1 exclusive) of the visible part of each visible object, the
        main one first.
      box_labels: (K,) int64 classes.
      caption: what is visible, in words.
    """

    image: np.ndarray
    label: int
    mask: np.ndarray
    depth_mm: np.ndarray
    boxes: np.ndarray
    box_labels: np.ndarray
    caption: str


def picture(seed: int, split: str, index: int, size: int) -> Picture:
    """Scene `index` of a split: a pure function of its arguments and layout.VERSION.

    Classes take turns, so any run of eight holds each.
    """
    rng = np.random.default_rng(layout.identity(seed, split, index))
    scene = layout.draw(rng, index % len(shapes.CLASS_NAMES))
    return render(scene, size, rng)


def render(scene: layout.Scene, size: int, rng: np.random.Generator) -> Picture:
    """`scene` at `size` pixels; `rng` draws the sensor noise."""
    canvas = _Canvas(scene, 2 * size)
    canvas.paint_backdrop()
    for number, solid in enumerate(scene.solids):
        canvas.paint_solid(number, solid)

    image = canvas.albedo()
    image *= canvas.light[..., None] * np.float32(scene.gain)
    # The tone curve x + k x (1 - x) brightens or darkens the middle as a gamma would, without a power.
    image = np.minimum(image, np.float32(1))
    image += scene.curve * image * (1 - image)
    image = (image[0::2, 0::2] + image[0::2, 1::2] + image[1::2, 0::2] + image[1::2, 1::2]) * np.float32(0.25)
    noise = rng.random((2, size, size, 3), np.float32)
    image += (noise[0] - noise[1]) * scene.noise
    image = (np.clip(image, 0, 1) * 255 + np.float32(0.5)).astype(np.uint8)

    instance, depth_mm = _second_nearest(canvas.instance, canvas.depth)
    kinds = np.array([solid.kind for solid in scene.solids])
    mask = np.concatenate([[GROUND, WALL], kinds + FIRST_CLASS]).astype(np.uint8)[instance]
    boxes, seen = _boxes(instance, len(kinds))
    return Picture(image, scene.label, mask, depth_mm, boxes, kinds[seen], layout.caption(kinds[seen].tolist()))


class _Canvas:
    """The picture at the resolution of the rays: depth, which thing each ray hits, its light and its entry in the
    palette."""

    def __init__(self, scene, n):
        self.scene, self.n = scene, n
        steps = (np.arange(n, dtype=np.float32) + np.float32(0.5)) * np.float32(2 / n) - np.float32(1)
        self.u, self.v = steps[None, :] * scene.tan_half_fov, -steps[:, None] * scene.tan_half_fov
        self.depth = np.empty((n, n), np.float32)
        self.light = np.empty((n, n), np.float32)
        self.instance = np.empty((n, n), np.uint8)  # 0 ground, 1 wall, _MAIN + k
        self.paint = np.empty((n, n), np.uint8)  # row of the palette
        solids = [colour for solid in scene.solids for colour in solid.colours]
        self.palette = np.array([scene.ground.colour, scene.wall.colour, *solids], np.float32)

    def albedo(self):
        return self.palette[self.paint]

    def rays(self, axes, window=(slice(None), slice(None))):
        """Ray directions in the frame whose three rows `axes` are given as camera components."""
        u, v = self.u[:, window[1]], self.v[window[0]]
        return tuple(a * u + (b * v + c) for a, b, c in axes)

    def paint_backdrop(self):
        scene = self.scene
        right, up, forward = scene.axes
        dx, dy, dz = self.rays(tuple(zip(right, up, forward, strict=True)))
        ex, ey, ez = scene.eye
        wx, wz, at = scene.wall_plane
        wall = (at - wx * ex - wz * ez) / (wx * dx + wz * dz)
        ground = np.where(dy < -1e-6, -ey / np.minimum(dy, np.float32(-1e-6)), np.float32(1e9))
        far = wall < ground
        self.depth[:] = t = np.where(far, wall, ground)
        self.instance[:] = self.paint[:] = far
        x, y, z = ex + t * dx, ey + t * dy, ez + t * dz

        on_wall = (wx * -z + wz * x, y)
        self.light[:] = np.where(
            far,
            _shade(scene, -(wx * scene.light[0] + wz * scene.light[2]), 0.0) * _faint(scene.wall, *on_wall),
            _shade(scene, scene.light[1], 1.0) * _faint(scene.ground, x, z),
        )
        for solid in scene.solids:
            self._shadow(solid, ~far, x, z)

    def _shadow(self, solid, where, x, z):
        """A soft blob on the ground, drawn out away from the light, and a darker one of contact under the solid."""
        lx, ly, lz = self.scene.light
        wide = max(solid.half[0], solid.half[2])
        long = min(solid.height * 2 / ly, 4 * solid.height)
        flat = max(float(np.sqrt(lx * lx + lz * lz)), 1e-6)
        ax, az = -lx / flat, -lz / flat
        rows = np.flatnonzero((where & (np.abs(z - solid.centre[2]) < long + 2 * wide)).any(axis=1))
        if not rows.size:
            return
        rows = slice(rows[0], rows[-1] + 1)
        dx, dz = x[rows] - solid.centre[0], z[rows] - solid.centre[2]
        along, across = dx * ax + dz * az, dz * ax - dx * az
        cast = _blob((along - 0.5 * long * flat) / (0.5 * long * flat + 1.15 * wide), across / (1.15 * wide))
        touch = _blob(dx / (1.2 * wide), dz / (1.2 * wide))
        keep = 1 - 0.85 * (1 - self.scene.ambient) * cast
        self.light[rows] *= np.where(where[rows], keep * (1 - 0.45 * touch), np.float32(1))

    def paint_solid(self, number, solid):
        scene = self.scene
        window = self._window(solid)
        if window is None:
            return
        # World to the solid's frame: shift, turn back, shrink to the unit solid.
        origin = _to_frame(solid, tuple(e - c for e, c in zip(scene.eye, solid.centre, strict=True)))
        axes = tuple(zip(*(_to_frame(solid, axis) for axis in scene.axes), strict=True))
        rays = self.rays(axes, window)
        shape = rays[0].shape
        rays = tuple(np.broadcast_to(d, shape).ravel() for d in rays)
        t, normals = shapes.intersect(solid.kind, origin, rays, solid.length)
        hits = np.flatnonzero(t < self.depth[window].ravel())
        if not hits.size:
            return
        points = tuple(o + t[hits] * d[hits] for o, d in zip(origin, rays, strict=True))
        normals = normals(hits)
        scale = tuple(s / solid.height for s in solid.half)
        second = shapes.pattern(solid.kind, points, normals, scale, solid.frequency, solid.phase, solid.blotches)

        # Normals go back to the world by the inverse transpose; only their products with light and vertical are needed.
        nx, ny, nz = (n * (1 / s) for n, s in zip(normals, solid.half, strict=True))
        length = np.sqrt(nx * nx + ny * ny + nz * nz)
        lx, ly, lz = _turn_back(solid, scene.light)
        facing = (nx * lx + ny * ly + nz * lz) / length

        row, column = np.divmod(hits, shape[1])
        at = row + window[0].start, column + window[1].start
        self.depth[at] = t[hits]
        self.instance[at] = _MAIN + number
        self.paint[at] = 2 + 2 * number + second
        self.light[at] = _shade(scene, facing, ny / length)

    def _window(self, solid):
        """Rows and columns that the corners of the solid's box cover, or None outside the picture or behind the eye."""
        lo, hi = [1e9, 1e9], [-1e9, -1e9]
        cos, sin = solid.turn
        for k in range(8):
            sx, sy, sz = (1 if k & bit else -1 for bit in (1, 2, 4))
            px, py, pz = sx * solid.half[0], sy * solid.height, sz * solid.half[2]
            world = (cos * px + sin * pz, py, cos * pz - sin * px)
            from_eye = tuple(c + p - e for c, p, e in zip(solid.centre, world, self.scene.eye, strict=True))
            x, y, z = (sum(a * p for a, p in zip(axis, from_eye, strict=True)) for axis in self.scene.axes)
            if z < 0.05:
                return slice(0, self.n), slice(0, self.n)
            for side, value in ((0, -y / z), (1, x / z)):
                pixel = (value / self.scene.tan_half_fov + 1) * self.n / 2
                lo[side], hi[side] = min(lo[side], pixel), max(hi[side], pixel)
        spans = [slice(max(int(a), 0), min(int(b) + 1, self.n)) for a, b in zip(lo, hi, strict=True)]
        return tuple(spans) if all(s.start < s.stop for s in spans) else None


def _turn_back(solid, v):
    cos, sin = solid.turn
    return cos * v[0] - sin * v[2], v[1], sin * v[0] + cos * v[2]


def _to_frame(solid, v):
    return tuple(a / s for a, s in zip(_turn_back(solid, v), solid.half, strict=True))


def _shade(scene, facing, upward):
    """Share of light on a surface: ambient, a little more from above than from below, and Lambert's share of the
    directional light."""
    return scene.ambient * (0.85 + 0.15 * upward) + (1 - scene.ambient) * np.maximum(facing, np.float32(0))


def _faint(backdrop, a, b):
    """Brightness of a backdrop's pattern over its surface coordinates, around 1."""
    if backdrop.kind == 0:
        return np.float32(1)
    cells = np.floor(a * (1 / backdrop.period))
    if backdrop.kind == 2:
        cells = cells + np.floor(b * (1 / backdrop.period))
    half = cells * 0.5
    return np.where(half == np.floor(half), np.float32(1 + backdrop.strength), np.float32(1 - backdrop.strength))


def _blob(a, b):
    """1 in the middle of the unit disc, 0 with zero slope at its border."""
    inside = np.maximum(1 - (a * a + b * b), np.float32(0))
    return inside * inside * (3 - 2 * inside)


def _second_nearest(instance, depth):
    """Instance and depth of each 2 x 2 block by its second nearest ray: a pixel belongs to an object that covers half
    of it or more.

    Depth and instance travel as one integer, so the two middle exchanges of a sorting network pick both.
    """
    mm = np.minimum(depth * 1000 + np.float32(0.5), np.float32(65535)).astype(np.int32)
    packed = mm * 8 + instance
    a, b, c, d = packed[0::2, 0::2], packed[0::2, 1::2], packed[1::2, 0::2], packed[1::2, 1::2]
    second = np.minimum(np.maximum(np.minimum(a, b), np.minimum(c, d)), np.minimum(np.maximum(a, b), np.maximum(c, d)))
    return second & 7, (second >> 3).astype(np.uint16)


def _boxes(instance, solids):
    """((K, 4) float32 boxes, indices of the K solids that are visible)."""
    boxes, seen = [], []
    for number in range(solids):
        inside = instance == _MAIN + number
        if np.count_nonzero(inside) < _VISIBLE * inside.size:
            continue
        rows, columns = np.flatnonzero(inside.any(axis=1)), np.flatnonzero(inside.any(axis=0))
        boxes.append((columns[0], rows[0], columns[-1] + 1, rows[-1] + 1))
        seen.append(number)
    return np.array(boxes, np.float32).reshape(-1, 4), seen
