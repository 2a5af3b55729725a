"""A contact sheet: small pictures in a grid, each with its class and name; masks and boxes drawn in, depth beside."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from regvit_jax.data.decode import decode, decode_map
from regvit_jax.data.sources import IGNORE, Source

COLUMNS, ROWS = 8, 6
SIDE, GAP, LINE = 160, 8, 13  # of a picture, between pictures, of a line of text; pixels
_BACKGROUND, _INK, _FAINT = (250, 250, 248), (20, 20, 20), (120, 120, 120)
_GOLDEN = 0.6180339887
# Colours of depth from near to far, evenly bright steps; what is unknown is grey.
_NEAR_TO_FAR = np.array([(253, 231, 140), (240, 150, 70), (190, 60, 100), (100, 40, 130), (25, 15, 60)], float)
_UNKNOWN = (170, 170, 170)


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
    """The sheet of (source, index, label) triples, in their order. Where any has depth, cells are twice as wide."""
    cells = [_cell(*picture) for picture in pictures]
    wide = max(len(small) for small, _ in cells)
    columns = min(max(1, COLUMNS // wide), len(cells))
    rows = -(-len(cells) // columns)
    tallest = max(small.height for smalls, _ in cells for small in smalls)
    cell_width, cell_height = wide * (SIDE + GAP), tallest + 2 * LINE + GAP
    sheet = Image.new("RGB", (columns * cell_width + GAP, rows * cell_height + GAP), _BACKGROUND)
    ink, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)
    for place, (smalls, lines) in enumerate(cells):
        row, column = divmod(place, columns)
        left, top = GAP + column * cell_width, GAP + row * cell_height
        for number, small in enumerate(smalls):
            start = left + number * (SIDE + GAP)
            sheet.paste(small, (start + (SIDE - small.width) // 2, top + tallest - small.height))
        for number, (text, colour) in enumerate(lines):
            ink.text((left, top + tallest + 1 + number * LINE), _fitting(text, font, cell_width - GAP), colour, font)
    return sheet


def _cell(source, index, label):
    """(the pictures side by side, [(line of text, its colour)])."""
    sample = source[index]
    smalls, title = [_thumbnail(sample)], source.class_names[label] if 0 <= label < source.num_classes else ""
    if not title and source.box_names and "box_labels" in sample:
        title = ", ".join(source.box_names[kind] for kind in dict.fromkeys(sample["box_labels"].tolist()))
    if "depth" in sample:
        small, metres = _depth(decode_map(sample["depth"]), smalls[0].size)
        smalls.append(small)
        title = f"{title}, {metres}" if title else metres
    return smalls, [(title, _INK), (source.name(index), _FAINT)] if title else [(source.name(index), _INK)]


def _thumbnail(sample):
    """The picture within SIDE x SIDE, its mask as tints, its boxes as frames, thin ones where they are difficult."""
    pixels = decode(sample["image"])
    height, width = pixels.shape[:2]
    scale = SIDE / max(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    # Tiny images are enlarged without smoothing: what the file holds is what is shown.
    how = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.BICUBIC
    small = Image.fromarray(pixels).resize(size, how)
    if "mask" in sample:
        values = _shrunk(decode_map(sample["mask"]).astype(np.int32), size)
        tinted = Image.blend(small, Image.fromarray(_colours(values)), 0.45)
        small.paste(tinted, mask=Image.fromarray(values != IGNORE))
    frames = ImageDraw.Draw(small)
    boxes = np.asarray(sample.get("boxes", []), float).reshape(-1, 4) * scale
    colours = _hues(np.asarray(sample.get("box_labels", np.zeros(len(boxes), int))), saturation=215)
    widths = np.where(sample.get("difficult", np.zeros(len(boxes), bool)), 1, 2)
    for box, colour, width in zip(boxes, colours.tolist(), widths.tolist(), strict=True):
        frames.rectangle([*box[:2], *np.maximum(box[2:] - 1, box[:2])], outline=tuple(colour), width=width)
    return small


def _depth(metres, size):
    """(the map in colours that span its own range, what that range is)."""
    metres = _shrunk(metres.astype(np.float32), size)
    known = np.isfinite(metres) & (metres > 0)
    if not known.any():
        return Image.new("RGB", size, _UNKNOWN), "no depth known"
    low, high = np.percentile(metres[known], (1, 99))
    place = np.clip((metres - low) / max(high - low, 1e-6), 0, 1)
    steps = np.linspace(0, 1, len(_NEAR_TO_FAR))
    colours = np.stack([np.interp(place, steps, channel) for channel in _NEAR_TO_FAR.T], -1)
    picture = np.where(known[..., None], colours, _UNKNOWN).astype(np.uint8)
    return Image.fromarray(picture), f"{low:.2f} to {high:.2f} m"


def _shrunk(values, size):
    return np.asarray(Image.fromarray(values).resize(size, Image.Resampling.NEAREST))


def _colours(values):
    """uint8 (H, W, 3): a hue a class number, neighbours far apart; 0 is black."""
    return np.where(values[..., None] == 0, 0, _hues(values)).astype(np.uint8)


def _hues(numbers, saturation=255):
    """uint8 (…, 3): a colour a class number, red for 0."""
    hue = (numbers * _GOLDEN % 1 * 255).astype(np.uint8).reshape(1, -1)
    channels = [hue, np.full_like(hue, saturation), np.full_like(hue, 255)]
    colours = np.asarray(Image.fromarray(np.stack(channels, -1), "HSV").convert("RGB"))
    return colours.reshape(*numbers.shape, 3)


def _fitting(text, font, width):
    """The end of a name tells more than its beginning."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength("…" + text) > width:
        text = text[1:]
    return "…" + text
