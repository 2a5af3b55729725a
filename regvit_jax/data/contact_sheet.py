"""A contact sheet: small pictures in a grid, each with its class and name, masks and boxes drawn in."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from regvit_jax.data.decode import decode, decode_map
from regvit_jax.data.sources import Source

COLUMNS, ROWS = 8, 6
SIDE, GAP, LINE = 160, 8, 13  # of a picture, between pictures, of a line of text; pixels
_BACKGROUND, _INK, _FAINT = (250, 250, 248), (20, 20, 20), (120, 120, 120)
_GOLDEN = 0.6180339887


def chosen(looks: Sequence, count: int = COLUMNS * ROWS) -> list:
    """Up to `count` of the looks, from as many classes as there are, class by class."""
    rng = np.random.default_rng(0)
    of_label: dict[int, list] = {}
    for place in rng.permutation(len(looks)):
        of_label.setdefault(looks[place].label, []).append(looks[place])
    labels = rng.permutation(sorted(of_label)).tolist()[:count]
    rounds = [of_label[label][turn] for turn in range(count) for label in labels if turn < len(of_label[label])]
    return sorted(rounds[:count], key=lambda look: look.label)


def draw(pictures: Sequence[tuple[Source, int, int]]) -> Image.Image:
    """The sheet of (source, index, label) triples, in their order."""
    columns = min(COLUMNS, len(pictures))
    rows = -(-len(pictures) // columns)
    cell_height = SIDE + 2 * LINE + GAP
    sheet = Image.new("RGB", (columns * (SIDE + GAP) + GAP, rows * cell_height + GAP), _BACKGROUND)
    ink, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)
    for place, (source, index, label) in enumerate(pictures):
        row, column = divmod(place, columns)
        left, top = GAP + column * (SIDE + GAP), GAP + row * cell_height
        small = _thumbnail(source[index])
        sheet.paste(small, (left + (SIDE - small.width) // 2, top + SIDE - small.height))
        title = source.class_names[label] if 0 <= label < source.num_classes else ""
        lines = [(title, _INK), (source.name(index), _FAINT)] if title else [(source.name(index), _INK)]
        for number, (text, colour) in enumerate(lines):
            ink.text((left, top + SIDE + 1 + number * LINE), _fitting(text, font), colour, font)
    return sheet


def _thumbnail(sample):
    """The picture within SIDE x SIDE, its mask as tints, its boxes as frames."""
    pixels = decode(sample["image"])
    height, width = pixels.shape[:2]
    scale = SIDE / max(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    # Tiny images are enlarged without smoothing: what the file holds is what is shown.
    how = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.BICUBIC
    small = Image.fromarray(pixels).resize(size, how)
    if "mask" in sample:
        values = Image.fromarray(decode_map(sample["mask"]).astype(np.int32)).resize(size, Image.Resampling.NEAREST)
        small = Image.blend(small, Image.fromarray(_colours(np.asarray(values))), 0.45)
    frames = ImageDraw.Draw(small)
    for box in np.asarray(sample.get("boxes", []), float).reshape(-1, 4) * scale:
        frames.rectangle([*box[:2], *np.maximum(box[2:] - 1, box[:2])], outline=(255, 40, 40), width=2)
    return small


def _colours(values):
    """uint8 (H, W, 3): a hue a class number, neighbours far apart; 0 is black."""
    hue = (values * _GOLDEN % 1 * 255).astype(np.uint8)
    full = np.where(values == 0, 0, 255).astype(np.uint8)
    return np.asarray(Image.fromarray(np.stack([hue, full, full], -1), "HSV").convert("RGB"))


def _fitting(text, font):
    """The end of a name tells more than its beginning."""
    if font.getlength(text) <= SIDE:
        return text
    while text and font.getlength("…" + text) > SIDE:
        text = text[1:]
    return "…" + text
