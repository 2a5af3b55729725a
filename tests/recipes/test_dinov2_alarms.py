"""What a DINOv2 run warns of, and what it does not."""

import math
import re

import pytest

from regvit_jax.config import defaults
from regvit_jax.metrics import Alarms
from regvit_jax.recipes import dinov2_alarms, get

K = 4096
# The teacher of a run that learns: some prototypes an image, many in use, class tokens .5 apart.
HEALTHY = {"teacher_entropy": 4.0, "prototypes_used": 900.0, "koleo": 0.2 * math.log(2)}


def heard(step=3000, **changes):
    c = defaults("dinov2")
    c.optim.warmup_steps, c.dinov2.freeze_last_layer = 2000, 1250
    return dinov2_alarms.alarms(c, K, step, HEALTHY | changes)


@pytest.mark.parametrize(
    "values, kind, message",
    [
        ({"teacher_entropy": 0.995 * math.log(K)}, "uniform", "8.276 of log K = 8.318.*sharper.*teacher_temp now 0.07"),
        ({"teacher_entropy": 0.05}, "one-hot", "higher dinov2.teacher_temp .now 0.07"),
        ({"prototypes_used": 1.2, "teacher_entropy": 0.01}, "one prototype", "1.20 of 4096.*sinkhorn"),
        # A mean -log distance of 5 in both views, at the weight of .1.
        ({"koleo": 0.2 * 5}, "crowded", "0.0067 apart.*koleo_weight .now 0.1"),
    ],
)
def test_collapse_is_told_with_what_to_try(values, kind, message):
    found = heard(**values)
    assert list(found) == [kind]
    text = " ".join(found[kind].split())
    assert re.search(message, text), text
    if kind != "one-hot":
        for advice in ("half of optim.lr", "drop_path=0.1", "b2=0.99", "larger batch_size", "warmup_steps"):
            assert advice in text


def test_a_run_that_learns_is_left_alone():
    assert heard() == {}
    assert heard(teacher_entropy=0.98 * math.log(K)) == heard(teacher_entropy=0.1) == heard(koleo=0.2 * 3.9) == {}
    assert heard(prototypes_used=3.0) == {}


def test_a_fresh_network_looks_collapsed_and_is_not():
    first = {"teacher_entropy": math.log(K), "koleo": 0.2 * 8}
    assert heard(step=2000, **first) == {}
    assert set(heard(step=2001, **first)) == {"uniform", "crowded"}


def test_without_koleo_there_is_none_to_look_at():
    c = defaults("dinov2")
    c.optim.warmup_steps = c.dinov2.freeze_last_layer = 0
    c.dinov2.koleo_weight = 0.0
    assert dinov2_alarms.alarms(c, K, 1, {"teacher_entropy": 4.0, "prototypes_used": 900.0}) == {}


def test_the_alarms_are_about_the_head_that_the_telemetry_is_about():
    c = defaults("dinov2")
    c.optim.warmup_steps = c.dinov2.freeze_last_layer = 0
    c.dinov2.separate_head, c.dinov2.prototypes, c.dinov2.ibot_prototypes = True, 4096, 64
    values = HEALTHY | {"teacher_entropy": math.log(64), "prototypes_used": 60.0}
    assert get("dinov2")(c).alarms(1, values) == {}
    c.dinov2.dino_weight = 0.0
    assert list(get("dinov2")(c).alarms(1, values)) == ["uniform"]


def test_an_alarm_is_told_when_it_lasts_and_once():
    alarms = Alarms(patience=3)
    course = [
        {"a": "x"},
        {"a": "x", "b": "y"},
        {"b": "y"},
        {"a": "x", "b": "z"},
        {"a": "x"},
        {"a": "w"},
        {"a": "x"},
        {},
    ]
    assert [alarms.hear(found) for found in course] == [[], [], [], ["z"], [], ["w"], [], []]
    assert [alarms.hear({"a": "x"}) for _ in range(4)] == [[]] * 4
