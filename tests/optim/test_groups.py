"""Parameter groups: the published multipliers, what is decayed, what is refused."""

import numpy as np
import pytest

from regvit_jax.optim import Group, default_group


def test_default_groups_of_a_dinov2_vit_l():
    def group(path, **kwargs):
        return default_group(path, depth=24, layer_decay=0.9, **kwargs)

    for path in ("patch_embed/kernel", "register_tokens", "mask_token", "pos_embed", "backbone/cls_token"):
        assert group(path).lr_mult == pytest.approx(0.0718, abs=5e-5)
    assert group("patch_embed/bias").scale_lr(0.2).lr_mult == pytest.approx(0.01436, abs=5e-6)
    for path in ("blocks/attn/qkv/kernel", "backbone/blocks/ls1/gamma"):
        mult = group(path).lr_mult
        assert (len(mult), mult[0], mult[-1]) == (24, pytest.approx(0.0798, abs=5e-5), pytest.approx(0.9))
    for path in ("norm/scale", "head/kernel", "fc_norm/bias"):
        assert group(path).lr_mult == 1.0
    assert default_group("blocks/attn/qkv/kernel", depth=24) == Group()


def test_what_is_decayed():
    decayed = {"patch_embed/kernel", "blocks/attn/qkv/kernel", "blocks/mlp/fc2/kernel", "head/kernel"}
    tokens = {"cls_token", "register_tokens", "mask_token", "pos_embed"}
    others = {"patch_embed/bias", "pre_norm/scale", "blocks/norm1/scale", "blocks/attn/qkv/bias", "blocks/ls2/gamma"}
    everything = decayed | tokens | others | {"norm/scale", "fc_norm/bias", "head/bias"}
    assert {path for path in everything if default_group(path, depth=2).wd_mult} == decayed
    dinov2 = ("bias", "*norm*", "gamma")
    assert {path for path in everything if default_group(path, depth=2, no_decay=dinov2).wd_mult} == decayed | tokens


def test_a_group_is_a_value():
    assert Group(lr_mult=[1.0, 0.5]) == Group(lr_mult=np.array([1.0, 0.5]))
    assert hash(Group(lr_mult=[1.0, 0.5])) == hash(Group(lr_mult=(1.0, 0.5)))
    assert Group(lr_mult=(1.0, 0.5)).scale_lr(0.5).lr_mult == (0.5, 0.25)
    assert (Group(frozen=True).thaw, Group(frozen=1).thaw, Group().thaw) == (None, 1, 0)


def test_groups_without_a_meaning_are_refused():
    with pytest.raises(ValueError, match="shape"):
        Group(lr_mult=np.ones((2, 1)))
    for frozen in (-1, 2.0, None):
        with pytest.raises(ValueError, match="frozen"):
            Group(frozen=frozen)
