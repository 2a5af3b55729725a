"""Host transforms: decoding of every kind of file, and what torchvision does to PIL images, by hand and recorded."""

import dataclasses
import io
import json
import math
import os
import pathlib
import pickle
import struct
import warnings
import zlib

import numpy as np
import PIL
import pytest
from PIL import Image, ImageFile

from regvit_jax.data import decode as decoding
from regvit_jax.data.decode import MAX_PIXELS, DecodeError, decode, decode_map
from regvit_jax.data.transforms import (
    EvalTransform,
    Preprocess,
    TrainTransform,
    center_crop,
    preprocess,
    random_crop_box,
    random_resized_crop,
    resize,
    resize_short,
)

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "torchvision_transforms.npz"


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def noise(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def png(width, height, bits, colour, rows):
    """A PNG file written by hand: `colour` is 0 grey, 2 RGB, 4 grey and alpha, 6 RGBA; `rows` its samples."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    packed = zlib.compress(b"".join(b"\0" + bytes(row) for row in rows))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", packed) + chunk(b"IEND", b"")


# Decoding


def test_all_forms_of_one_image_agree(tmp_path):
    pixels = noise(5, 7)
    image = Image.fromarray(pixels)
    image.save(tmp_path / "a.png")
    for form in (
        pixels,
        image,
        encoded(image),
        tmp_path / "a.png",
        str(tmp_path / "a.png"),
        memoryview(encoded(image)),
    ):
        np.testing.assert_array_equal(decode(form), pixels)


def test_other_colour_modes_become_rgb():
    grey = Image.new("L", (2, 3), 100)
    palette = Image.new("P", (2, 3), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    cases = [
        (grey, (100, 100, 100)),
        (palette, (10, 20, 30)),
        (Image.new("RGBA", (2, 3), (10, 20, 30, 0)), (10, 20, 30)),
        (Image.new("LA", (2, 3), (100, 0)), (100, 100, 100)),
        (Image.new("1", (2, 3), 1), (255, 255, 255)),
        (Image.new("CMYK", (2, 3), (255, 0, 0, 0)), (0, 255, 255)),
        (np.full((3, 2), 100, np.uint8), (100, 100, 100)),
        (np.full((3, 2, 1), 100, np.uint8), (100, 100, 100)),
        (np.full((3, 2, 4), 100, np.uint8), (100, 100, 100)),
    ]
    for image, colour in cases:
        pixels = decode(image)
        assert pixels.shape == (3, 2, 3) and pixels.dtype == np.uint8
        np.testing.assert_array_equal(pixels, np.broadcast_to(np.array(colour), (3, 2, 3)))


def test_sixteen_bit_grey_keeps_its_high_byte():
    values = np.array([[0, 255, 256], [0x1234, 0xFF00, 0xFFFF]], np.uint16)
    np.testing.assert_array_equal(decode(encoded(Image.fromarray(values)))[..., 0], [[0, 0, 1], [0x12, 255, 255]])


def test_a_transparent_palette_raises_no_warning():
    image = Image.new("P", (2, 2), 1)
    image.putpalette([0, 0, 0, 10, 20, 30])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_array_equal(decode(encoded(image, transparency=b"\x00\x40"))[0, 0], [10, 20, 30])


def test_sixteen_bit_colour_keeps_its_high_byte_too():
    # One pixel of 0x1234, 0xFF00, 0x00FF; then with alpha; grey with alpha; a grey file of Netpbm.
    rgb = [0x12, 0x34, 0xFF, 0x00, 0x00, 0xFF]
    assert decode(png(1, 1, 16, 2, [rgb])).tolist() == [[[0x12, 0xFF, 0x00]]]
    assert decode(png(1, 1, 16, 6, [[*rgb, 0, 0]])).tolist() == [[[0x12, 0xFF, 0x00]]]
    assert decode(png(1, 1, 16, 4, [[0x12, 0x34, 0, 0]])).tolist() == [[[0x12] * 3]]
    assert decode(b"P5 1 1 65535\n" + bytes(rgb[:2])).tolist() == [[[0x12] * 3]]
    # Where the file says what is white, that counts: of 65535 in colour, of 1000 in grey.
    assert decode(b"P6 1 1 65535\n" + bytes(rgb)).tolist() == [[[0x12, 0xFE, 0x01]]]
    assert decode(b"P5 2 1 1000\n" + struct.pack(">HH", 500, 1000))[..., 0].tolist() == [[128, 255]]
    big_endian = Image.frombytes("I;16B", (1, 1), bytes(rgb[:2]))
    assert decode(encoded(big_endian, "TIFF")).tolist() == [[[0x12] * 3]]


def test_few_bits_are_spread_over_the_whole_range():
    assert decode(png(4, 1, 2, 0, [[0b00_01_10_11]]))[0, :, 0].tolist() == [0, 85, 170, 255]
    assert decode(png(3, 1, 1, 0, [[0b101_00000]]))[0, :, 0].tolist() == [255, 0, 255]


@pytest.mark.parametrize(("mode", "value", "kind"), [("F", 0.5, "floating point"), ("I", 100, "32-bit integers")])
def test_values_without_a_white_are_refused(mode, value, kind):
    with pytest.raises(DecodeError, match=f"{kind}.*which one is white: save it with 8 or 16 bits"):
        decode(encoded(Image.new(mode, (2, 2), value), "TIFF"))


def test_cmyk_jpeg_is_read_with_the_polarity_of_adobe():
    # A fifth of the light is left by cyan ink of 200 of 255; half of it by black of 128.
    photo = encoded(Image.new("CMYK", (8, 8), (200, 0, 0, 128)), "JPEG", quality=100)
    np.testing.assert_allclose(decode(photo)[4, 4], [55 * 127 / 255, 127, 127], atol=2)
    # The same four numbers a pixel, declared as YCCK: luma 200 and no colour, which the file stores as 255 - ink, so
    # ink is 200 in each of three; 255 stored is no black.
    stored = Image.new("CMYK", (8, 8), (255 - 200, 255 - 128, 255 - 128, 255 - 255))
    photo = bytearray(encoded(stored, "JPEG", quality=100))
    transform = photo.index(b"Adobe") + 11
    assert photo[transform] == 0
    photo[transform] = 2
    np.testing.assert_allclose(decode(bytes(photo))[4, 4], [55, 55, 55], atol=2)


UPRIGHT = {
    1: [[1, 2, 3], [4, 5, 6]],
    2: [[3, 2, 1], [6, 5, 4]],
    3: [[6, 5, 4], [3, 2, 1]],
    4: [[4, 5, 6], [1, 2, 3]],
    5: [[1, 4], [2, 5], [3, 6]],
    6: [[4, 1], [5, 2], [6, 3]],
    7: [[6, 3], [5, 2], [4, 1]],
    8: [[3, 6], [2, 5], [1, 4]],
}


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_photos_stand_upright(kind, tmp_path):
    """What the EXIF standard says of rows and columns; squares of 16 pixels, so that JPEG keeps them apart."""
    squares = np.kron(np.uint8([[1, 2, 3], [4, 5, 6]]) * 40, np.ones((16, 16), np.uint8))[..., None].repeat(3, axis=2)
    options = {"JPEG": {"quality": 100}, "WEBP": {"lossless": True}}.get(kind, {})
    for orientation, expected in UPRIGHT.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        photo = encoded(Image.fromarray(squares), kind, exif=exif, **options)
        (tmp_path / "photo").write_bytes(photo)
        with Image.open(io.BytesIO(photo)) as opened:
            for form in (photo, tmp_path / "photo", opened):
                upright = decode(form)
                np.testing.assert_array_equal(np.rint(upright[8::16, 8::16, 0] / 40), expected)
                assert upright.shape == (16 * len(expected), 16 * len(expected[0]), 3)


def test_broken_exif_says_nothing():
    image = Image.fromarray(noise(4, 6))
    for exif in (b"Exif\0\0garbage", b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x63\0\0\0\0\0\0"):
        np.testing.assert_array_equal(decode(encoded(image, exif=exif)), noise(4, 6))


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "TIFF", "PNG"])
def test_the_first_frame_is_taken(kind):
    frames = [Image.new("RGB", (2, 2), (value,) * 3) for value in (51, 204)]
    options = {"lossless": True} if kind == "WEBP" else {}
    several = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert decode(several).tolist() == [[[51] * 3] * 2] * 2


def test_absurd_sizes_are_refused_before_they_are_allocated(monkeypatch):
    side = math.isqrt(MAX_PIXELS)
    for width, height in ((side, side + 1), (65000, 65000), (2**31 - 1, 1), (1, 2**30)):
        with pytest.raises(DecodeError, match=f"bomb.png: .* says it has {width} x {height} pixels"):
            decode(png(width, height, 8, 2, [[0] * 100]), name="bomb.png")
        with pytest.raises(DecodeError, match="says it has"):
            decode_map(png(width, height, 8, 0, [[0] * 100]))
    with pytest.raises(DecodeError, match="not a readable image"):
        decode(png(0, 5, 8, 2, [[]] * 5))
    # Half of Pillow's own limit makes it warn, all of it raise; both are a global variable, which stays as it is.
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert decode(encoded(Image.fromarray(noise(9, 9)))).shape == (9, 9, 3)
    assert Image.MAX_IMAGE_PIXELS == 10 and not ImageFile.LOAD_TRUNCATED_IMAGES


def test_a_strip_that_a_resize_would_blow_up_is_refused(monkeypatch):
    strip = noise(1, 65_000)
    with pytest.raises(DecodeError, match="65000 x 1 pixels, its short side resized to 256, would have 256 x 16640000"):
        resize_short(strip, 256)
    for transform in (EvalTransform(Preprocess(224)), TrainTransform(224, "center")):
        with pytest.raises(DecodeError, match="65000 x 1 pixels"):
            transform({"image": strip}, np.random.default_rng(0))
    assert TrainTransform(8)({"image": strip}, np.random.default_rng(0))["image"].shape == (8, 8, 3)


def test_only_files_are_read(tmp_path, monkeypatch):
    (tmp_path / "folder.jpg").mkdir()
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "endless.jpg").symlink_to("/dev/zero")
    for name in ("folder", "pipe", "endless"):
        for read in (decode, decode_map):
            with pytest.raises(DecodeError, match=rf"{name}\.jpg: .*it is no file"):
                read(tmp_path / f"{name}.jpg")
    (tmp_path / "nowhere.jpg").symlink_to(tmp_path / "gone")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        decode(tmp_path / "nowhere.jpg")
    monkeypatch.setattr(decoding, "MAX_BYTES", 10)
    (tmp_path / "huge.png").write_bytes(encoded(Image.fromarray(noise(9, 9))))
    with pytest.raises(DecodeError, match=r"huge\.png: .*more than 10"):
        decode(tmp_path / "huge.png")
    with pytest.raises(DecodeError, match="no known format"):
        decode(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF", "GIF", "BMP"])
def test_a_truncated_file_is_named(tmp_path, kind):
    whole = encoded(Image.fromarray(noise(32, 32)), kind)
    path = tmp_path / f"half.{kind}"
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DecodeError, match=rf"half\.{kind}: not a readable image"):
        decode(path)


def test_what_is_no_image_is_named(tmp_path):
    (tmp_path / "text.jpg").write_text("hello")
    with pytest.raises(ValueError, match=r"text\.jpg: not a readable image"):
        decode(tmp_path / "text.jpg")
    with pytest.raises(DecodeError, match="photo 7: not a readable image"):
        decode(b"", name="photo 7")
    with pytest.raises(FileNotFoundError, match=r"none\.jpg"):
        decode(tmp_path / "none.jpg")
    with pytest.raises(DecodeError, match="uint8 from 0 to 255, this is float32"):
        decode(np.zeros((2, 2, 3), np.float32))
    with pytest.raises(DecodeError, match=r"this is \(3, 224, 224\)"):
        decode(np.zeros((3, 224, 224), np.uint8))
    with pytest.raises(DecodeError, match="got int"):
        decode(7)


def test_maps_keep_their_values(tmp_path):
    depth = np.array([[0, 65535], [1234, 7]], np.uint16)
    Image.fromarray(depth).save(tmp_path / "depth.png")
    palette = Image.fromarray(np.array([[0, 1], [2, 255]], np.uint8), "P")
    palette.putpalette([9] * 768)
    np.testing.assert_array_equal(decode_map(tmp_path / "depth.png"), depth)
    np.testing.assert_array_equal(decode_map(encoded(palette)), [[0, 1], [2, 255]])
    with pytest.raises(DecodeError, match="one channel"):
        decode_map(noise(2, 2))


# Geometry


@pytest.mark.parametrize(
    ("height", "width", "size", "expected"),
    [
        (100, 200, 50, (50, 100)),
        (200, 101, 50, (99, 50)),
        (375, 500, 256, (256, 341)),
        (3, 3, 8, (8, 8)),
        (7, 30, 7, (7, 30)),
    ],
)
def test_the_short_side_is_resized_and_the_long_side_rounded_down(height, width, size, expected):
    assert resize_short(np.zeros((height, width, 3), np.uint8), size).shape[:2] == expected


def test_an_image_of_the_right_size_is_left_alone():
    image = noise(6, 9)
    assert resize_short(image, 6) is image


def test_shrinking_is_antialiased():
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 255
    assert np.abs(resize_short(stripes, 16)[4:-4, 4:-4].astype(int) - 127).max() <= 3


@pytest.mark.parametrize(
    # torchvision's int(round((side - size) / 2)), where Python rounds 0.5 to 0, 1.5 and 2.5 to 2.
    ("side", "size", "top"),
    [(8, 4, 2), (5, 4, 0), (7, 4, 2), (9, 4, 2)],
)
def test_the_centre_is_where_torchvision_has_it(side, size, top):
    image = np.arange(side * side, dtype=np.int32).reshape(side, side)
    np.testing.assert_array_equal(center_crop(image, size), image[top : top + size, top : top + size])


def test_a_small_image_is_padded_with_zeros():
    cropped = center_crop(np.full((3, 8, 3), 9, np.uint8), 6)
    assert cropped.shape == (6, 6, 3)
    # 3 rows are missing: 1 above, 2 below.
    np.testing.assert_array_equal(cropped[:, 0, 0], [0, 9, 9, 9, 0, 0])


def test_random_crops_fit_and_have_the_asked_area_and_aspect():
    rng = np.random.default_rng(0)
    boxes = np.array([random_crop_box(300, 400, rng, (0.2, 0.5), (0.5, 2.0)) for _ in range(500)])
    top, left, height, width = boxes.T
    assert (top >= 0).all() and (left >= 0).all() and (top + height <= 300).all() and (left + width <= 400).all()
    area, log_aspect = height * width / 120_000, np.log(width / height)
    assert area.min() > 0.19 and area.max() < 0.51 and abs(area.mean() - 0.35) < 0.02
    assert np.abs(log_aspect).max() < np.log(2.05) and abs(log_aspect.mean()) < 0.1
    assert len(set(top)) > 50 and len(set(left)) > 50


@pytest.mark.parametrize(
    ("height", "width", "box"),
    # No crop of the whole area fits a strip at 3/4 to 4/3: the largest centre crop inside the range is taken.
    [(100, 10, (43, 0, 13, 10)), (10, 100, (0, 43, 10, 13)), (1, 50, (0, 24, 1, 1))],
)
def test_a_strip_falls_back_to_the_centre(height, width, box):
    assert random_crop_box(height, width, np.random.default_rng(0), (1.0, 1.0), (3 / 4, 4 / 3)) == box


def test_a_crop_of_everything_is_a_resize():
    image = noise(20, 20)
    cropped = random_resized_crop(image, 8, np.random.default_rng(0), scale=(1.0, 1.0), ratio=(1.0, 1.0))
    np.testing.assert_array_equal(cropped, Image.fromarray(image).resize((8, 8), Image.Resampling.BICUBIC))


def test_pixels_and_boxes_are_those_of_torchvision():
    """Recorded by tests/golden/torchvision_transforms.py. Exactly: both leave the pixels to Pillow, which rounds them
    otherwise from one major version to the next; but for "nearest", where it shows which pixels were taken."""
    golden = np.load(GOLDEN)
    same_pillow = str(golden["pillow"]) == PIL.__version__
    counts = dict.fromkeys(("resize", "centre", "crop"), 0)
    for key in golden.files:
        kind, *rest = key.split("/")
        if kind not in counts or not (same_pillow or kind == "centre" or rest[-1] == "nearest"):
            continue
        image = golden[f"image/{rest[0]}"]
        if kind == "resize":
            ours = resize_short(image, int(rest[1]), rest[2])
        elif kind == "centre":
            ours = center_crop(image, int(rest[1]))
        else:
            top, left, height, width = map(int, rest[1].split(","))
            ours = resize(image[top : top + height, left : left + width], int(rest[2]), int(rest[2]), rest[3])
        np.testing.assert_array_equal(ours, golden[key], err_msg=key)
        counts[kind] += 1
    assert min(counts.values()) >= 7


def test_random_boxes_are_those_of_torchvision_for_its_draws():
    class Recorded:
        """The draws of torchvision in their order; it draws an aspect ratio where `random_crop_box` draws its log."""

        def __init__(self, draws, scale):
            self.draws, self.scale = iter(draws), scale

        def uniform(self, low, high):
            value = next(self.draws)
            return value if (low, high) == self.scale else math.log(value)

        def integers(self, high):
            value = int(next(self.draws))
            assert 0 <= value < high
            return value

    golden = np.load(GOLDEN)
    fallbacks = 0
    for (height, width, *numbers), draws in zip(golden["boxes"].tolist(), golden["draws"], strict=True):
        scale, ratio, box = tuple(numbers[:2]), tuple(numbers[2:4]), tuple(map(int, numbers[4:]))
        used = draws[~np.isnan(draws)]
        assert random_crop_box(int(height), int(width), Recorded(used, scale), scale, ratio) == box
        fallbacks += len(used) == 20
    # Both ways out of the ten tries were met.
    assert 5 < fallbacks < 395


# Preprocess and the sample transforms


def test_preprocess_is_resize_crop_normalise():
    image = np.zeros((40, 20, 3), np.uint8)
    image[...] = (0, 127, 255)
    spec = Preprocess(size=8, crop_ratio=0.8, mean=(0.0, 0.5, 0.5), std=(1.0, 1.0, 0.25))
    batch = preprocess([image, Image.fromarray(image), encoded(Image.fromarray(image))], spec)
    assert batch.shape == (3, 8, 8, 3) and batch.dtype == np.float32
    np.testing.assert_allclose(batch, np.broadcast_to([0.0, 127 / 255 - 0.5, 2.0], batch.shape), atol=1e-6)


def test_preprocess_refuses_what_is_no_list(tmp_path):
    for one in (str(tmp_path), noise(4, 4), Image.new("RGB", (4, 4)), b"x"):
        with pytest.raises(ValueError, match=r"write \[image\]"):
            preprocess(one, Preprocess(8))
    with pytest.raises(ValueError, match="empty list"):
        preprocess([], Preprocess(8))


@pytest.mark.parametrize(
    # timm and DeiT round down: 224 / 0.9 = 248.9. 14 / 0.14 is 100, but 99.99999999999999 in floating point.
    ("size", "ratio", "expected"),
    [(224, 0.875, 256), (224, 0.9, 248), (224, 1.0, 224), (14, 0.14, 100)],
)
def test_the_size_before_the_crop(size, ratio, expected):
    assert Preprocess(size, ratio).resize_size == expected


def test_a_spec_survives_json_and_is_hashable():
    spec = Preprocess(size=96, mean=(0.1, 0.2, 0.3))
    restored = Preprocess(**json.loads(json.dumps(dataclasses.asdict(spec))))
    assert restored == spec and hash(restored) == hash(spec)


def test_wrong_options_are_refused():
    with pytest.raises(ValueError, match="interpolation is one of nearest"):
        Preprocess(interpolation="cubic")
    with pytest.raises(ValueError, match="crop_ratio"):
        Preprocess(crop_ratio=1.5)
    with pytest.raises(ValueError, match="3 values"):
        Preprocess(mean=(0.5,))
    with pytest.raises(ValueError, match="'rrc', 'center' or 'none'"):
        TrainTransform(8, crop="src")
    with pytest.raises(ValueError, match="low before high"):
        TrainTransform(8, scale=(1.0, 0.08))


@pytest.mark.parametrize("crop", ["rrc", "center", "none"])
def test_train_samples_have_one_shape(crop):
    transform = pickle.loads(pickle.dumps(TrainTransform(8, crop=crop)))
    for height, width in ((8, 8), (5, 30), (40, 16)):
        sample = transform({"image": noise(height, width), "caption": "x"}, np.random.default_rng(0))
        assert sample.keys() == {"image", "label"}
        assert sample["image"].shape == (8, 8, 3) and sample["image"].dtype == np.uint8
        assert sample["label"] == -1 and sample["label"].dtype == np.int32


def test_no_crop_leaves_a_fitting_image_untouched():
    image = noise(8, 8)
    rng = np.random.default_rng(0)
    np.testing.assert_array_equal(TrainTransform(8, crop="none")({"image": image}, rng)["image"], image)


@pytest.mark.parametrize(
    "transform", [EvalTransform(Preprocess(16, 0.8)), TrainTransform(16), TrainTransform(16, "center")]
)
def test_masks_and_depth_move_with_the_image(transform):
    # The left half is red, class 1 and 2.5 m away; so it must be wherever the crop puts it.
    left = np.zeros((60, 90), bool)
    left[:, :45] = True
    sample = {
        "image": np.where(left[..., None], np.uint8([255, 0, 0]), np.uint8([0, 0, 255])),
        "mask": encoded(Image.fromarray(left.astype(np.uint8))),
        "depth": np.where(left, np.float32(2.5), np.float32(9.0)),
        "label": 3,
        "area": 0.5,
        "boxes": np.zeros((2, 4)),
    }
    for seed in range(5):
        out = transform(sample, np.random.default_rng(seed))
        assert out.keys() == {"image", "mask", "depth", "label", "area"} and out["area"] == 0.5 and out["label"] == 3
        red = out["image"][..., 0].astype(int)
        certain = (red < 20) | (red > 235)
        np.testing.assert_array_equal((red > 128)[certain], (out["mask"] == 1)[certain])
        np.testing.assert_array_equal(out["mask"] == 1, out["depth"] == 2.5)
        assert set(np.unique(out["depth"])) <= {2.5, 9.0} and out["depth"].dtype == np.float32


def test_a_mask_of_another_size_is_refused():
    exif = Image.Exif()
    exif[0x0112] = 6
    sample = {"image": encoded(Image.fromarray(noise(4, 8)), exif=exif), "mask": np.zeros((4, 8), np.uint8)}
    with pytest.raises(ValueError, match=r"the mask has shape \(4, 8\), its image \(8, 4\).*EXIF orientation"):
        EvalTransform(Preprocess(8))(sample, None)


def test_an_aspect_ratio_is_drawn_as_often_below_one_as_above():
    rng = np.random.default_rng(1)
    wide = [box[3] > box[2] for box in (random_crop_box(1000, 1000, rng, (0.1, 0.3), (1 / 4, 4)) for _ in range(400))]
    # 400 fair coins: 5 standard deviations.
    assert abs(np.mean(wide) - 0.5) < 5 * 0.5 / math.sqrt(400)
