"""The others in throughput.py, in PyTorch: timm's and Hugging Face's model of the same architecture.

Each function takes the options, the images as (B, S, S, 3) uint8 and the number of classes, and returns what
contenders.Built says.
"""

import contextlib
import importlib.metadata
from collections.abc import Callable

import numpy as np
import torch

SIZES = {"s": "small", "b": "base", "l": "large"}


def timm(o: dict, pixels: np.ndarray, classes: int) -> tuple:
    """timm's model of the same weights: compiled on a GPU, eager on a CPU."""
    import timm

    torch.set_float32_matmul_precision("high")
    extra = {"depth": o["depth"]} if o["depth"] else {}
    model = timm.create_model(
        f"vit_{SIZES[o['model']]}_patch14_reg4_dinov2",
        pretrained=False,
        img_size=o["image_size"],
        num_classes=classes if o["work"] == "train" else 0,
        **extra,
    )
    forward = model.forward_features if o["work"] == "forward" else model
    return _torch(o, model, forward, pixels, classes, ("torch", "timm"))


def huggingface(o: dict, pixels: np.ndarray, classes: int) -> tuple:
    """transformers' Dinov2WithRegisters, with scaled_dot_product_attention."""
    import transformers

    width, depth, heads = {"s": (384, 12, 6), "b": (768, 12, 12), "l": (1024, 24, 16)}[o["model"]]
    config = transformers.Dinov2WithRegistersConfig(
        hidden_size=width,
        num_hidden_layers=o["depth"] or depth,
        num_attention_heads=heads,
        image_size=o["image_size"],
        patch_size=14,
        num_register_tokens=4,
        num_labels=classes,
    )
    auto = transformers.AutoModelForImageClassification if o["work"] == "train" else transformers.AutoModel
    model = auto.from_config(config, attn_implementation="sdpa")

    def forward(images):
        out = model(images)
        return out.logits if o["work"] == "train" else out.last_hidden_state

    return _torch(o, model, forward, pixels, classes, ("torch", "transformers"))


def _torch(o: dict, model, forward: Callable, pixels: np.ndarray, classes: int, packages: tuple[str, ...]) -> tuple:
    cuda = o["platform"] == "cuda"
    device, dtype = torch.device("cuda" if cuda else "cpu"), getattr(torch, o["dtype"])
    model.to(device)
    images = (torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 128 - 1).contiguous().to(device)
    if o["work"] == "forward":
        model.eval().to(dtype)
        images = images.to(dtype)
    compiled = torch.compile(forward) if o["compile"] else forward
    if o["work"] == "train":
        model.train()
        labels = torch.arange(o["batch"], device=device) % classes
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.05, fused=cuda)
        half = torch.autocast(device.type, dtype) if dtype != torch.float32 else contextlib.nullcontext()

    def step() -> None:
        if o["work"] == "forward":
            compiled(images)
            return
        with half:
            loss = torch.nn.functional.cross_entropy(compiled(images).float(), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def run(steps: int) -> None:
        with torch.inference_mode() if o["work"] == "forward" else contextlib.nullcontext():
            for _ in range(steps):
                step()
        if cuda:
            torch.cuda.synchronize()

    run(3)
    weights = f"{o['dtype']}{' autocast' if o['work'] == 'train' and o['dtype'] != 'float32' else ''}"
    what = f"{weights}, {'torch.compile' if o['compile'] else 'eager'}, sdpa"
    versions = {package: importlib.metadata.version(package) for package in packages}
    return run, lambda: torch.cuda.max_memory_allocated() if cuda else None, {"what": what, "versions": versions}
