"""What TrainTransform does beside the crop."""

import numpy as np

from regvit_jax.data.transforms import TrainTransform


def test_a_share_of_the_images_is_mirrored_with_its_mask():
    """Of 400 draws at 1/4, about 100; none at 0, all at 1; the crop is the same."""
    image = np.zeros((6, 6, 3), np.uint8)
    image[:, :3] = 200
    sample = {"image": image, "mask": image[..., 0]}

    def mirrored(flip):
        transform = TrainTransform(6, crop="none", flip=flip)
        made = [transform(sample, np.random.default_rng(seed)) for seed in range(400)]
        assert all((one["mask"] == one["image"][..., 0]).all() for one in made)
        assert all((one["image"] == image).all() or (one["image"] == image[:, ::-1]).all() for one in made)
        return sum(one["image"][0, 0, 0] == 0 for one in made)

    assert mirrored(0.0) == 0 and mirrored(1.0) == 400
    assert 70 < mirrored(0.25) < 130
