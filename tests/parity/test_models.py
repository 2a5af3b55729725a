"""The libraries' own networks at S size beside ours, in both directions: the same weights give the same tokens, in
early and late blocks, and come back bit for bit under their own names.

DINO's and DeiT-III's code is not to be had as packages: timm's network of the same keys stands in for it, with
positions resampled here by the rules of the two papers' repositories.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest
import timm
import torch
import transformers
from timm.models.vision_transformer import checkpoint_filter_fn
from torch.nn.functional import interpolate

import regvit_jax as rv

pytestmark = pytest.mark.parity
ON_TOKENS, ON_BLOCKS = 2e-5, 5e-5
# Differences only grow from block to block, and compiling with each of them captured takes three times as long.
BLOCKS = (5, 11)


@dataclasses.dataclass(frozen=True)
class Case:
    """One network.

    Attributes:
      family: whose key table is used.
      build: (side or (height, width) in pixels) -> the library's network, as it initialises it.
      patch: side of a patch; the native grid is 8 x 8, the other one 6 x 10.
      resampled: (their position rows of the grid (1, D, 8, 8), h, w) -> (1, D, h, w), where the stand-in has another
        rule than the family; None where the library resamples by itself.
      given: what keys cannot tell.
    """

    family: str
    build: Callable[[Any], torch.nn.Module]
    patch: int = 14
    resampled: Callable | None = None
    given: dict = dataclasses.field(default_factory=dict)


def _hugging_face(registers, classes=0, **config):
    def build(size):
        kind = "Dinov2WithRegisters" if registers else "Dinov2"
        fields = dict(hidden_size=384, num_hidden_layers=12, num_attention_heads=6, image_size=size, patch_size=14)
        fields |= config | ({"num_register_tokens": registers} if registers else {})
        fields |= {"num_labels": classes} if classes else {}
        wrapper = "ForImageClassification" if classes else "Model"
        return getattr(transformers, kind + wrapper)(getattr(transformers, kind + "Config")(**fields))

    return build


def _timm(name, **args):
    return lambda size: timm.create_model(name, img_size=size, **{"dynamic_img_size": True, "num_classes": 10} | args)


def _by_scale(grid, h, w):
    """DINO: the scale factor, with a tenth of a patch against rounding, is also what places the samples."""
    return interpolate(grid, scale_factor=((h + 0.1) / 8, (w + 0.1) / 8), mode="bicubic")


def _by_size(grid, h, w):
    """DeiT-III's finetuning."""
    return interpolate(grid, size=(h, w), mode="bicubic", align_corners=False)


PLAIN = "vit_small_patch16_224"
ALONE = {"class_token": False}
CASES = {
    "Hugging Face Dinov2": Case("huggingface", _hugging_face(0), given={"num_heads": 6}),
    "Hugging Face registers": Case("huggingface", _hugging_face(4), given={"num_heads": 6}),
    "Hugging Face SwiGLU": Case("huggingface", _hugging_face(4, use_swiglu_ffn=True), given={"num_heads": 6}),
    "Hugging Face classifier": Case("huggingface", _hugging_face(4, classes=10), given={"num_heads": 6}),
    "timm DINOv2 registers": Case("timm", _timm("vit_small_patch14_reg4_dinov2", num_classes=0)),
    "timm DeiT-III": Case("timm", _timm("deit3_small_patch16_224"), 16),
    "timm token": Case("timm", _timm(PLAIN), 16),
    "timm registers with positions": Case("timm", _timm(PLAIN, reg_tokens=4, init_values=1e-5), 16),
    "timm average": Case("timm", _timm(PLAIN, **ALONE, reg_tokens=4, global_pool="avg", no_embed_class=True), 16),
    "timm average, registers with positions": Case(
        "timm", _timm(PLAIN, **ALONE, reg_tokens=4, global_pool="avg", fc_norm=False, qkv_bias=False), 16
    ),
    "timm attention pooling": Case("timm", _timm(PLAIN, **ALONE, reg_tokens=4, global_pool="map", fc_norm=False), 16),
    "timm SwiGLU": Case(
        "timm", _timm("vit_giant_patch14_reg4_dinov2", embed_dim=384, depth=12, num_heads=6, num_classes=0)
    ),
    "timm CLIP": Case("timm", _timm("vit_base_patch16_clip_224", embed_dim=384, num_heads=6), 16),
    "DINO": Case("dino", _timm(PLAIN, num_classes=0), 16, _by_scale),
    "DeiT-III": Case("deit3", _timm("deit3_small_patch16_224"), 16, _by_size),
}


@dataclasses.dataclass
class Pair:
    """A case, its network with random weights, and ours that was made from them."""

    label: str
    case: Case
    module: torch.nn.Module
    state: dict[str, np.ndarray]
    ours: rv.Model

    @property
    def native(self):
        return (8 * self.case.patch,) * 2

    @property
    def other(self):
        return 6 * self.case.patch, 10 * self.case.patch

    def theirs(self, watched, images, size):
        """([stream], tokens, logits or None) of the library's network."""
        module = self.module if size == self.native or self.case.resampled is None else self.resized(size)
        if hasattr(module, "base_model"):
            base = module.base_model
            head = (lambda x: module(x).logits) if hasattr(module, "classifier") else (lambda x: None)
            return watched(base.encoder.layer, lambda x: (base(x).last_hidden_state, head(x)), images)
        head = module.forward_head if isinstance(module.head, torch.nn.Linear) else lambda tokens: None
        return watched(module.blocks, lambda x: ((t := module.forward_features(x)), head(t)), images)

    def resized(self, size):
        """The network built for another size, its positions by the family's own rule."""
        state, (h, w) = dict(self.module.state_dict()), (side // self.case.patch for side in size)
        first = state["pos_embed"].shape[1] - 64
        grid = state["pos_embed"][:, first:].reshape(1, 8, 8, -1).permute(0, 3, 1, 2)
        rows = self.case.resampled(grid, h, w).flatten(2).transpose(1, 2)
        state["pos_embed"] = torch.cat([state["pos_embed"][:, :first], rows], dim=1)
        head = 10 if "head.weight" in state else 0
        module = _timm_at(self.label, size, head)
        module.load_state_dict(state, strict=True)
        return module.eval()

    def load(self, state):
        """Weights that we wrote, into the library's network; nothing may be missing or left over."""
        tensors = {key: torch.from_numpy(array) for key, array in state.items()}
        if hasattr(self.module, "base_model"):
            # The names of files: only from_pretrained knows what they are called in memory.
            self.module, found = type(self.module).from_pretrained(
                None, config=self.module.config, state_dict=tensors, output_loading_info=True
            )
            assert not any(found.values()), found
            self.module.eval()
        else:
            if self.case.family == "deit3":
                tensors = checkpoint_filter_fn(tensors, self.module, adapt_layer_scale=True)
            self.module.load_state_dict(tensors, strict=True)


def _timm_at(label, size, classes):
    build = {"DINO": PLAIN, "DeiT-III": "deit3_small_patch16_224"}[label]
    return timm.create_model(build, img_size=size, num_classes=classes)


# One process compiles for all tests of a case.
@pytest.fixture(scope="module", params=[pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in CASES])
def pair(request, randomised, numbers):
    case = CASES[request.param]
    module = randomised(lambda: case.build(8 * case.patch))
    state = numbers(module)
    if case.family == "deit3":
        state = {key.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2"): a for key, a in state.items()}
    return Pair(request.param, case, module, state, rv.from_torch(state, case.family, **case.given))


def sequence(tokens):
    parts = [] if tokens.cls is None else [tokens.cls[:, None]]
    return np.concatenate([*parts, tokens.registers, tokens.patches], axis=1)


@jax.jit
def _head(model, tokens):
    return model.module().logits(tokens)


def compare(pair, model, watched, images, measured, direction):
    """Streams, tokens and logits of both at the native size, tokens at the other one."""
    x = images(*pair.native)
    streams, tokens, logits = pair.theirs(watched, x, pair.native)
    with jax.default_matmul_precision("highest"):
        found, captured = model(x, capture=tuple(f"block{i}" for i in BLOCKS))
        away = {"blocks": max(np.abs(captured[f"block{i}"] - streams[i]).max() for i in BLOCKS)}
        away["tokens"] = np.abs(sequence(found) - tokens).max()
        assert (logits is not None) == bool(model.config.num_classes)
        if logits is not None:
            away["logits"] = np.abs(np.asarray(_head(model, found)) - logits).max()
        y = images(*pair.other)
        _, tokens, _ = pair.theirs(watched, y, pair.other)
        away["other size"] = np.abs(sequence(model(y)) - tokens).max()
    measured(f"{pair.label}, {direction}", away)
    scale = np.abs(streams[-1]).max()
    assert 1 < scale < 100 and np.std(tokens) > 0.3, "the weights do not put the network to the test"
    assert all(value <= (ON_BLOCKS if what == "blocks" else ON_TOKENS) for what, value in away.items()), away


def test_theirs_to_ours(pair, watched, images, measured):
    compare(pair, pair.ours, watched, images, measured, "theirs to ours")


def test_theirs_to_ours_and_back_is_bit_exact(pair):
    back = rv.to_torch(pair.ours)
    assert list(back) == list(pair.state)
    for key, array in pair.state.items():
        assert back[key].dtype == array.dtype and back[key].tobytes() == array.tobytes(), key


def test_ours_to_theirs(pair, watched, images, measured):
    """Last of the three: it leaves other weights, each parameter back to front, in their network."""
    params = jax.tree.map(lambda leaf: np.flip(leaf).copy(), pair.ours.params)
    model = dataclasses.replace(pair.ours, params=params, origin=None)
    pair.load(rv.to_torch(model, pair.case.family))
    compare(pair, model, watched, images, measured, "ours to theirs")
