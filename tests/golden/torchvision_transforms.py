"""Writes torchvision_transforms.npz beside this file: what torchvision does to PIL images, where it is installed.

    python tests/golden/torchvision_transforms.py

Keys: `image/NAME`; `resize/NAME/SIZE/MODE`, `centre/NAME/SIZE`, `crop/NAME/TOP,LEFT,HEIGHT,WIDTH/SIZE/MODE`: uint8
pixels. `boxes` (n, 10): height, width, scale and ratio of a random resized crop, then the box it gave. `draws` (n, 22):
the random numbers that it took in their order (share of the area and aspect ratio of each try, top, left), then NaN.
`pillow`, `versions`: what it was made with; Pillow 13 rounds some resizes otherwise than 12.
"""

import pathlib
from unittest import mock

import numpy as np
import PIL
import torch
import torchvision
from PIL import Image
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms import functional as F

SHAPES = ((21, 30), (30, 21), (24, 24), (1, 9), (9, 1), (2, 40), (5, 4))
MODES = {mode.value: mode for mode in map(InterpolationMode, ("nearest", "bilinear", "bicubic", "lanczos"))}


def main():
    rng, out = np.random.default_rng(0), {}
    for height, width in SHAPES:
        pixels = rng.integers(0, 256, (height, width, 3), np.uint8)
        image, name = Image.fromarray(pixels), f"{height}x{width}"
        out[f"image/{name}"] = pixels
        for size in {1, 5, 13, min(height, width)}:
            for mode in MODES:
                out[f"resize/{name}/{size}/{mode}"] = np.array(F.resize(image, size, interpolation=MODES[mode]))
            out[f"centre/{name}/{size}"] = np.array(F.center_crop(image, [size, size]))
        for mode in MODES:
            h, w = rng.integers(1, height + 1), rng.integers(1, width + 1)
            box = [int(x) for x in (rng.integers(height - h + 1), rng.integers(width - w + 1), h, w)]
            cropped = F.resized_crop(image, *box, [8, 8], interpolation=MODES[mode])
            out[f"crop/{name}/{','.join(map(str, box))}/8/{mode}"] = np.array(cropped)
    rows = [random_box(rng, seed) for seed in range(400)]
    out["boxes"], out["draws"] = (np.array(column) for column in zip(*rows, strict=True))
    out["pillow"] = np.array(PIL.__version__)
    out["versions"] = np.array(f"torchvision {torchvision.__version__}, torch {torch.__version__}")
    np.savez_compressed(pathlib.Path(__file__).with_suffix(".npz"), **out)


def random_box(rng, seed):
    height, width = (int(x) for x in rng.integers(1, 300, 2))
    low, flat = rng.uniform(0.05, 1), rng.uniform(0.2, 1.5)
    scale, ratio = (low, rng.uniform(low, 1)), (flat, rng.uniform(flat, 3))
    draws = []
    exp, uniform, randint = torch.exp, torch.Tensor.uniform_, torch.randint

    def recorded(function, keep):
        def call(*args, **kwargs):
            value = function(*args, **kwargs)
            if keep(args):
                draws.append(value.item())
            return value

        return call

    with (
        mock.patch.object(torch, "exp", recorded(exp, lambda args: True)),
        # The aspect ratio is kept after its exp; only the bounds of its draw are tensors.
        mock.patch.object(torch.Tensor, "uniform_", recorded(uniform, lambda args: isinstance(args[1], float))),
        mock.patch.object(torch, "randint", recorded(randint, lambda args: True)),
    ):
        torch.manual_seed(seed)
        box = RandomResizedCrop.get_params(torch.empty(3, height, width), scale, ratio)
    return (height, width, *scale, *ratio, *box), draws + [np.nan] * (22 - len(draws))


if __name__ == "__main__":
    main()
