"""What a kept fit depends on, and the line that says how far something is."""

import dataclasses

import jax
import pytest

from regvit_jax.evals import progress
from regvit_jax.evals.depth import Depth
from regvit_jax.evals.saved import key_of
from regvit_jax.evals.segmentation import Segmentation


@dataclasses.dataclass
class Samples:
    fingerprint: str = "ab"
    n: int = 3

    def __len__(self):
        return self.n


def test_a_key_tells_whatever_the_heads_depend_on(model):
    probe, source = Segmentation(data="pairs:a,b"), Samples()
    key = key_of(probe, model, source, ("sky", "sea"))
    for option in (dict(data="pairs:/mnt/a,b"), dict(batch_size=1), dict(workers=3), dict(save_every=7)):
        assert key_of(dataclasses.replace(probe, **option), model, source, ("sky", "sea")) == key, option
    weights = dataclasses.replace(model, params=jax.tree.map(lambda leaf: leaf + 1, model.params))
    smaller = dataclasses.replace(model, preprocessing=dataclasses.replace(model.preprocessing, size=24))
    others = {
        key_of(dataclasses.replace(probe, lr=0.5), model, source, ("sky", "sea")),
        key_of(dataclasses.replace(probe, flip=True), model, source, ("sky", "sea")),
        key_of(probe, model, source, ("sky", "lake")),
        key_of(Depth(), model, source, ("sky", "sea")),
        key_of(probe, weights, source, ("sky", "sea")),
        key_of(probe, smaller, source, ("sky", "sea")),
        key_of(probe, model, Samples("cd"), ("sky", "sea")),
        key_of(probe, model, Samples(n=4), ("sky", "sea")),
    }
    assert len(others - {key}) == 8
    flipped = dataclasses.replace(probe, flip=True)
    assert key_of(probe, model, source, no_matter=("flip",)) == key_of(flipped, model, source, no_matter=("flip",))


def test_progress_is_a_line_every_half_minute(monkeypatch, caplog):
    caplog.set_level("INFO")
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    tell = progress.Progress("probe: measured", 200)
    for seconds, done in ((31, 0), (10, 20), (9, 50), (1, 51), (19, 60), (1, 81)):
        now[0] += seconds
        tell(done)
    assert [record.getMessage() for record in caplog.records] == [
        "probe: measured 20 of 200 images, 0.49 img/s, 6m09s left",
        "probe: measured 81 of 200 images, 1.14 img/s, 1m44s left",
    ]


@pytest.mark.parametrize("kind", [Segmentation, Depth])
def test_a_negative_number_of_steps_is_refused(kind):
    with pytest.raises(ValueError, match="save_every must be 0 or more"):
        kind(save_every=-1)
