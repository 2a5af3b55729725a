"""ImageNet-1k by nearest neighbours, DINOv2's protocol: nothing is trained.

    regvit eval --config=configs/protocols/imagenet_knn.py --model=dinov2_vitl14_reg4 \
        --data=imagenet:/data/imagenet --dtype=bfloat16 --out=imagenet_knn.json

/data/imagenet has train/n01440764/*.JPEG and val/, in class folders or flat beside the devkit's list. Class tokens of
1.28 M training images, short side 256, centre 224; k of 10, 20, 100 and 200, weights softmax(similarity / .07). The
number told is that of the best k. --set cache_dir=FOLDER keeps the features for other probes. Not run yet: one pass
over the images.

Top-1 to expect (DINOv2's README, without and with registers): ViT-S/14 79.0 and 79.1, B 82.1 and 82.0, L 83.5 and
83.8, g 83.5 and 83.7.
"""

from regvit_jax.config import evaluator, protocol


def get_config():
    c = protocol(image_size=224, crop_ratio=0.875)
    c.evals.knn = evaluator("knn", k=(10, 20, 100, 200), temperature=0.07)
    return c
