"""Writes torchvision_colors.npz beside this file: what torchvision does to the colours of PIL images, where it is
installed.

    python tests/golden/torchvision_colors.py

Keys: `image`: uint8 (20, 28, 3), half of it noise, half slow gradients; `brightness/F`, `contrast/F`, `saturation/F`,
`hue/F`, `gray/0`, `blur/SIGMA` (9 x 9 pixels), `solarize/THRESHOLD`: what became of it. `pillow`, `versions`: what it
was made with.
"""

import pathlib

import numpy as np
import PIL
import torch
import torchvision
from PIL import Image
from torchvision.transforms import functional as F

PARAMETERS = {
    "brightness": (F.adjust_brightness, (0.0, 0.6, 0.83, 1.17, 1.4)),
    "contrast": (F.adjust_contrast, (0.0, 0.6, 0.83, 1.17, 1.4)),
    "saturation": (F.adjust_saturation, (0.0, 0.8, 0.93, 1.07, 1.2)),
    "hue": (F.adjust_hue, (-0.5, -0.1, -0.037, 0.001, 0.05, 0.1, 0.5)),
    "gray": (lambda image, _: F.rgb_to_grayscale(image, 3), (0,)),
    "blur": (lambda image, sigma: F.gaussian_blur(image, [9, 9], [sigma, sigma]), (0.1, 0.5, 1.0, 2.0)),
    "solarize": (F.solarize, (128,)),
}


def main():
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:20, :28]
    slow = np.stack([x * 9, y * 12, 255 - x * 5 - y * 4], -1).astype(np.uint8)
    pixels = np.where((x < 14)[..., None], rng.integers(0, 256, slow.shape, np.uint8), slow)
    out = {"image": pixels}
    for name, (function, values) in PARAMETERS.items():
        for value in values:
            out[f"{name}/{value}"] = np.array(function(Image.fromarray(pixels), value))
    out["pillow"] = np.array(PIL.__version__)
    out["versions"] = np.array(f"torchvision {torchvision.__version__}, torch {torch.__version__}")
    np.savez_compressed(pathlib.Path(__file__).with_suffix(".npz"), **out)


if __name__ == "__main__":
    main()
