"""Names of models and the files that their authors released: fetched once, kept, and checked on every use.

Files lie in $REGVIT_CACHE/weights, by default ~/.cache/regvit_jax/weights; one placed there by hand is as good as a
downloaded one. REGVIT_WEIGHTS_URL=https://mirror/path replaces https://dl.fbaipublicfiles.com in every address.
"""

import dataclasses
import difflib
import logging
import os
import pathlib

from regvit_jax.convert.archive import WeightsError
from regvit_jax.convert.download import DownloadError, download, record, recorded
from regvit_jax.convert.files import sha256_of

HOST = "https://dl.fbaipublicfiles.com"


@dataclasses.dataclass(frozen=True)
class Released:
    """A file of weights.

    Attributes:
      path: below HOST, or below the mirror.
      family: its naming scheme, a key of `regvit_jax.convert.FAMILIES`; "linear_head": DINOv2's ImageNet classifiers.
      sha256: hex digest, "" where no source states one; then the digest of the first download holds.
    """

    path: str
    family: str
    sha256: str = ""

    @property
    def url(self) -> str:
        return f"{os.environ.get('REGVIT_WEIGHTS_URL', HOST).rstrip('/')}/{self.path}"

    @property
    def place(self) -> pathlib.Path:
        """Where it lies on this machine, or would."""
        cache = os.environ.get("REGVIT_CACHE") or os.path.expanduser("~/.cache/regvit_jax")
        return pathlib.Path(cache, "weights", self.path.rpartition("/")[2])


# Digests: the DINOv2 converter in scripts/conversion of finegrain-ai/refiners; all but that of g-reg4 are stated alike
# by unrelated repositories. Addresses: model zoo and hub entry points of facebookresearch/dinov2.
_DINOV2 = {
    "vits14": "b938bf1bc15cd2ec0feacfe3a1bb553fe8ea9ca46a7e1d8d00217f29aef60cd9",
    "vitb14": "0b8b82f85de91b424aded121c7e1dcc2b7bc6d0adeea651bf73a13307fad8c73",
    "vitl14": "d5383ea8f4877b2472eb973e0fd72d557c7da5d3611bd527ceeb1d7162cbf428",
    "vitg14": "baf8467e50af277596bbbafa06887c177ee899ab46033649c383577d7e9309d3",
    "vits14_reg4": "f433177089a681826f849f194ece3bb48f4d63fb38d32fc837e3dc7a4e5641fb",
    "vitb14_reg4": "73182a088cf94833c94b1666d1c99e02fe87e2007bff57b564fb6206e25dba71",
    "vitl14_reg4": "36e4deffbaef061a2576705b0c36f93621e2ae20bf6274694821b0b492551b51",
    "vitg14_reg4": "746ecb8c6301c645c5c855be91687d274587d6e48fdaec4a729753160b34a283",
}
# README_revenge.md of facebookresearch/deit, model zoo. There is no Ti, and M and H exist at 224 pixels only.
_DEIT3 = {
    "vits16": ("small", (224, 384)),
    "vitm16": ("medium", (224,)),
    "vitb16": ("base", (224, 384)),
    "vitl16": ("large", (224, 384)),
    "vith14": ("huge", (224,)),
}
# README.md of facebookresearch/dino, "backbone only". The ViT-S were called DeiT-S when they were made; of S/8 there is
# a second one, of 300 epochs, which its hub entry point does not load.
_DINO = {
    "vits16": "dino_deitsmall16_pretrain",
    "vits8": "dino_deitsmall8_pretrain",
    "vitb16": "dino_vitbase16_pretrain",
    "vitb8": "dino_vitbase8_pretrain",
}


def _table() -> dict[str, Released]:
    table = {}
    for name, digest in _DINOV2.items():
        folder = f"dinov2/dinov2_{name.partition('_')[0]}/dinov2_{name}"
        table[f"dinov2_{name}"] = Released(f"{folder}_pretrain.pth", "dinov2", digest)
        for layers in ("", "4"):  # ImageNet classifiers on the last block, and on the last four
            table[f"dinov2_{name}_linear{layers}"] = Released(f"{folder}_linear{layers}_head.pth", "linear_head")
    for name, (size, sides) in _DEIT3.items():
        for side in sides:
            for data in ("1k", "21k"):
                # Plain names are those at 224 pixels trained on ImageNet-1k; 21k means pre-trained there, 1000 classes.
                key = f"deit3_{name}" + (f"_{side}" if side != 224 else "") + ("_in21k" if data == "21k" else "")
                version = "_v1" if (size, data) == ("huge", "21k") else ""
                table[key] = Released(f"deit/deit_3_{size}_{side}_{data}{version}.pth", "deit3")
    for name, file in _DINO.items():
        table[f"dino_{name}"] = Released(f"dino/{file}/{file}.pth", "dino")
    return table


RELEASED = _table()


def fetch(name: str) -> pathlib.Path:
    """The file that was released under a name, from the cache or from its authors' server.

    Raises:
      ValueError: if nothing was released under this name; lists the nearest that were.
      DownloadError: if it is not here and cannot be fetched; says which file to place where.
      WeightsError: if the file in the cache is not the one that is meant.
    """
    if name not in RELEASED:
        near = difflib.get_close_matches(name, RELEASED, n=4, cutoff=0.5)
        raise ValueError(f"no weights were released as {name!r}; nearest: {', '.join(near) or ', '.join(RELEASED)}")
    released = RELEASED[name]
    place = released.place
    if not place.exists():
        logging.info("fetching %s to %s", released.url, place)
        try:
            download(released.url, place, sha256=released.sha256 or None)
        except DownloadError as error:
            raise DownloadError(
                f"{error}. To load {name!r} on this machine, place the file {released.url} as {place}, or set "
                "REGVIT_WEIGHTS_URL to a mirror"
            ) from error
        return place
    digest, expected = sha256_of(place), released.sha256 or _first_digest(place)
    if digest != expected:
        raise WeightsError(
            f"{place} is not the file it was or should be (SHA-256 {digest}, expected {expected}): delete it and load "
            f"{name!r} again"
        )
    return place


def _first_digest(place: pathlib.Path) -> str:
    """What the file was when it was first used; of one placed by hand, that is now."""
    if not recorded(place).exists():
        record(place, sha256_of(place))
    return recorded(place).read_text().split()[0]
