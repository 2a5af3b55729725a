"""What the multi-crop augmentation of DINOv2 and DINO is: its constants, and the random choices that make one crop.

No JAX here: data workers and the accelerator read the same description. `multicrop` makes the crops on the accelerator,
`multicrop_host` with Pillow.
"""

import dataclasses
import math
from typing import Any, NamedTuple

from regvit_jax.config import key

BLURS = ("gaussian9", "pillow")
INTERPOLATIONS = ("bicubic", "bilinear")
# Places of the four operations of colour jitter in View.factors and View.order.
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)


class View(NamedTuple):
    """The random choices of one crop; in a batch every field has the axes of the batch in front."""

    box: Any  # (4,) top, left, height, width in pixels of the original image
    flip: Any  # bool: mirrored left to right
    factors: Any  # (4,) of brightness, contrast and saturation (1: no change), then the shift of hue in turns (0: none)
    order: Any  # (4,) int: the place in `factors` of what is changed first, second, …
    gray: Any  # bool
    sigma: Any  # of the blur in pixels of the crop; 0: none
    solarize: Any  # bool


class CropKind(NamedTuple):
    """What is not random about a crop."""

    size: int  # side in pixels
    scale: tuple[float, float]  # share of the image's area
    blur: float  # probability
    solarize: float  # probability


@dataclasses.dataclass(frozen=True)
class MultiCrop:
    """Two global crops and a number of local ones; the defaults are those of DINOv2.

    Probabilities are those with which a thing really happens. DINOv2's code asks for a blur with 1.0, 0.1 and 0.5 and,
    by an inversion in it, blurs with 0.0, 0.9 and 0.5: the released weights were trained so. DINO (v1) blurs with
    (1.0, 0.1, 0.5) and blur_kind="pillow", and has global_scale=(0.4, 1.0), local_scale=(0.05, 0.4), local_size=96.

    Raises:
      ValueError: for values that no crop can have; it names the field.
    """

    global_size: int = key(224, "side of the two global crops in pixels")
    local_size: int = key(98, "side of the local crops in pixels")
    local_crops: int = key(8, "number of local crops; 0 = none")
    global_scale: tuple[float, float] = key((0.32, 1.0), "share of the image's area in a global crop")
    local_scale: tuple[float, float] = key((0.05, 0.32), "share of the image's area in a local crop")
    ratio: tuple[float, float] = key((3 / 4, 4 / 3), "width / height of what is cut out")
    interpolation: str = key("bicubic", "bicubic | bilinear, antialiased, as Pillow's")
    flip: float = key(0.5, "probability of a horizontal flip")
    jitter: float = key(0.8, "probability of colour jitter, its four operations in random order")
    brightness: float = key(0.4, "factor within 1 - and 1 + this")
    contrast: float = key(0.4, "factor within 1 - and 1 + this")
    saturation: float = key(0.2, "factor within 1 - and 1 + this")
    hue: float = key(0.1, "shift within - and + this part of the colour circle, at most 0.5")
    gray: float = key(0.2, "probability of a crop without colour")
    blur: tuple[float, float, float] = key((0.0, 0.9, 0.5), "probability for the first, second global and local crops")
    blur_kind: str = key("gaussian9", "gaussian9 (9 x 9 pixels, DINOv2) | pillow (Pillow's approximation, DINO)")
    sigma: tuple[float, float] = key((0.1, 2.0), "standard deviation of the blur in pixels")
    solarize: float = key(0.2, "probability, second global crop only")
    threshold: int = key(128, "values from this on are inverted by solarize")

    def __post_init__(self):
        for field in dataclasses.fields(self):
            # From a config come lists and whole numbers; the spec is hashed as a constant of a compiled step.
            if isinstance(field.default, tuple):
                object.__setattr__(self, field.name, tuple(float(value) for value in getattr(self, field.name)))
        # What the blur reaches beyond the border is the mirror image, of a crop that must be wider than that.
        least = 5 if self.blur_kind == "gaussian9" and max(self.blur) > 0 else 1
        for name in ("global_size", "local_size"):
            self._check(name, getattr(self, name) >= least, f"at least {least}")
        self._check("local_crops", self.local_crops >= 0, "0 or more")
        for name in ("global_scale", "local_scale"):
            self._check(name, _range(getattr(self, name)) and getattr(self, name)[1] <= 1, "(low, high) in (0, 1]")
        self._check("ratio", _range(self.ratio), "(low, high) above 0")
        self._check("interpolation", self.interpolation in INTERPOLATIONS, " or ".join(INTERPOLATIONS))
        for name in ("flip", "jitter", "gray", "solarize"):
            self._check(name, 0 <= getattr(self, name) <= 1, "a probability")
        for name in ("brightness", "contrast", "saturation"):
            self._check(name, 0 <= getattr(self, name) < math.inf, "0 or more")
        self._check("hue", 0 <= self.hue <= 0.5, "in [0, 0.5]")
        self._check("blur", len(self.blur) == 3 and all(0 <= p <= 1 for p in self.blur), "three probabilities")
        self._check("blur_kind", self.blur_kind in BLURS, " or ".join(BLURS))
        self._check("sigma", _range(self.sigma), "(low, high) above 0")
        self._check("threshold", 0 <= self.threshold <= 256, "in [0, 256]")

    @property
    def kinds(self) -> tuple[CropKind, ...]:
        """Of every crop in order: two global ones, then the local ones."""
        first, second, local = self.blur
        return (
            CropKind(self.global_size, self.global_scale, first, 0.0),
            CropKind(self.global_size, self.global_scale, second, self.solarize),
            *(CropKind(self.local_size, self.local_scale, local, 0.0),) * self.local_crops,
        )

    @property
    def factor_ranges(self) -> tuple[tuple[float, float], ...]:
        """(low, high) of each of View.factors."""
        strengths = (self.brightness, self.contrast, self.saturation)
        return (*((max(0.0, 1.0 - strength), 1.0 + strength) for strength in strengths), (-self.hue, self.hue))

    def _check(self, name, good, allowed):
        if not good:
            raise ValueError(f"multi-crop: {name}={getattr(self, name)!r} must be {allowed}")


def _range(values):
    return len(values) == 2 and 0 < values[0] <= values[1] < math.inf
