"""Recipe: the only contract between the training loop and a method, with the parts that methods share."""

import abc
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from regvit_jax.data.transforms import Preprocess, TrainTransform
from regvit_jax.flops import training_flops
from regvit_jax.models.config import Execution, ViTConfig
from regvit_jax.models.model import Model
from regvit_jax.models.zoo import config_of
from regvit_jax.optim import Group, default_group, lr_schedule
from regvit_jax.optim.schedules import Schedule
from regvit_jax.recipes import start
from regvit_jax.sharding import BATCH, constrain
from regvit_jax.trees import Array, Tree

Batch = dict[str, Array]


class Recipe(abc.ABC):
    """A training method. Everything but `__init__` is traced inside the one jitted step, or is a constant of it.

    A recipe holds no arrays: params and extras live in the train state and are passed in.

    Attributes:
      Config: frozen dataclass of the recipe's own keys, mounted at config.<recipe>.
      DEFAULTS: {dotted key: value} of common keys whose default is another one under this recipe.
      AUGMENTS_ON: the values of config.data.augment_on that it knows.
      couples_examples: why the loss of a batch is not the mean of the losses of its parts, "" where it is. With a
        reason, config.accum_steps > 1 is refused.
      WHEN_NOT_FINITE: what else to try under this recipe when a metric is NaN.
      vit: architecture of the backbone.
      run: how it is computed.
      preprocessing: of the model that comes out.
    """

    Config: ClassVar[type]
    DEFAULTS: ClassVar[Mapping[str, Any]] = {}
    AUGMENTS_ON: ClassVar[tuple[str, ...]] = ("device",)
    labelled: ClassVar[bool] = False  # whether the head has one output for each class of the data
    couples_examples: ClassVar[str] = ""
    WHEN_NOT_FINITE: ClassVar[str] = ""

    def __init__(self, config: ConfigDict):
        """Reads and checks its part of a config.

        Raises:
          ValueError: naming the key that is not possible.
        """
        if config.accum_steps > 1 and self.couples_examples:
            raise ValueError(
                f"config.accum_steps={config.accum_steps} is not possible with recipe {config.recipe!r}: "
                f"{self.couples_examples}; set it to 1"
            )
        if config.data.augment_on not in self.AUGMENTS_ON:
            raise ValueError(
                f"config.data.augment_on={config.data.augment_on!r} is not possible with recipe {config.recipe!r}: it "
                f"augments on the {' or '.join(self.AUGMENTS_ON)}"
            )
        self.config = config
        self.vit = vit_config(config)
        self.run = execution(config)
        self.preprocessing = Preprocess(
            size=min(self.vit.image_size),
            crop_ratio=config.data.crop_ratio,
            interpolation=config.data.interpolation,
            mean=tuple(config.data.mean),
            std=tuple(config.data.std),
        )

    @classmethod
    def paths(cls, config: ConfigDict) -> dict[str, str]:
        """{name: what `rv.load_model` takes} of the models that a run of this config starts from."""
        return {"init_from": config.init_from} if config.init_from else {}

    def prepare(self, loaded: dict[str, Any]) -> dict[str, Any]:
        """What `init` gets of the models that were read from disk, made to fit the config; logs what was changed.

        Called once, before anything is traced: here a recipe learns what networks they are.

        Args:
          loaded: {name: Model} of `paths`, and {"name:heads": {name of a tree: tree}} of what lay beside each, {} where
            nothing did. Some or all may be missing where shapes alone are asked for.

        Raises:
          ValueError: for weights that cannot be made to fit.
        """
        if "init_from" not in loaded:
            return {}
        model, notes = start.adapt(loaded["init_from"], self.vit)
        start.tell("init_from", notes, model, self.preprocessing)
        return {"init_from": model}

    def alarms(self, step: int, values: Mapping[str, float]) -> dict[str, str]:
        """{kind: what is wrong and what to try} of what the metrics of a progress line say. The loop tells a kind once,
        when it has held for a while."""
        del step, values
        return {}

    @property
    def input_spec(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Global shapes and dtypes of a batch as the loader delivers it."""
        b, (h, w) = self.config.batch_size, self.vit.image_size
        return {"image": jax.ShapeDtypeStruct((b, h, w, 3), jnp.uint8), "label": jax.ShapeDtypeStruct((b,), jnp.int32)}

    @property
    def transform(self) -> Callable:
        """What the loader does to a sample on the host; it delivers the fields of `input_spec`. Picklable."""
        d, fields = self.config.data, tuple(self.input_spec)
        size = self.input_spec["image"].shape[1]
        return TrainTransform(size, d.crop, tuple(d.scale), tuple(d.ratio), d.interpolation, fields=fields)

    @abc.abstractmethod
    def init(self, key: Array, loaded: dict[str, Model]) -> tuple[Tree, Tree]:
        """(params, extras) at step 0. `loaded` is what `prepare` returned, usually nothing."""

    @abc.abstractmethod
    def augment(self, batch: Batch, key: Array, step: Array) -> Batch:
        """The batch as `loss` wants it: on the accelerator, at global shape.

        What is drawn for an example is drawn here and put into the batch, axis 0 over examples (stochastic depth too):
        then it stays with the example in whatever micro-batch that lands.
        """

    @abc.abstractmethod
    def loss(self, params: Tree, extras: Tree, batch: Batch, key: Array, step: Array) -> tuple[Array, dict[str, Any]]:
        """(scalar float32, aux); aux["metrics"] are float32 scalars to log."""

    def after_update(self, params: Tree, extras: Tree, aux: dict[str, Any], step: Array) -> Tree:
        """Extras after an update: teacher, averages, centres.

        `params` are the new ones, `step` the number of updates before.
        """
        del params, aux, step
        return extras

    def schedules(self) -> dict[str, Schedule]:
        """What `Group.lr_schedule` may name, and "wd" where the weight decay has a course of its own."""
        return {"lr": lr_schedule(self.config.optim, self.config.total_steps)}

    def train_flops(self) -> float:
        """FLOPs of one training image, forward and backward, all its views together."""
        return training_flops(self.vit)

    def param_groups(self, path: str) -> Group:
        """What the optimiser does with a parameter."""
        return default_group(path, depth=self.vit.depth, layer_decay=self.config.optim.layer_decay)

    def grads(
        self, params: Tree, extras: Tree, batch: Batch, key: Array, step: Array
    ) -> tuple[Array, dict[str, Any], Tree]:
        """(loss, aux, gradients): the mean over config.accum_steps micro-batches, which for a loss that is a mean over
        examples is that of the whole batch.

        Micro-batch i takes rows i, i + A, i + 2A, …, so that each of them is spread over all devices like the whole
        batch. It has a key of its own: only what `loss` itself draws differs from the whole batch. A recipe whose loss
        couples examples says so (`couples_examples`), and accumulation is refused, or overrides this.
        """
        value_and_grad = jax.value_and_grad(self.loss, has_aux=True)
        count = self.config.accum_steps
        if count == 1:
            (loss, aux), grads = value_and_grad(params, extras, batch, key, step)
            return loss, aux, grads

        def micro_batches(x):
            return constrain(jnp.swapaxes(x.reshape(x.shape[0] // count, count, *x.shape[1:]), 0, 1), None, BATCH)

        def one(total, part):
            (loss, aux), grads = value_and_grad(params, extras, part["batch"], part["key"], step)
            return jax.tree.map(lambda t, x: t + x / count, total, (loss, aux, grads)), None

        parts = {"batch": jax.tree.map(micro_batches, batch), "key": jax.random.split(key, count)}
        first = jax.tree.map(lambda x: x[0], parts)
        (loss, aux), grads = jax.eval_shape(lambda p: value_and_grad(params, extras, p["batch"], p["key"], step), first)
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), (loss, aux, grads))
        return jax.lax.scan(one, zeros, parts)[0]

    @abc.abstractmethod
    def eval_model(self, params: Tree, extras: Tree) -> Model:
        """The model that is measured and saved: a selection of leaves of the state, nothing computed."""


def vit_config(config: ConfigDict) -> ViTConfig:
    """The architecture that config.model describes.

    Raises:
      ValueError: naming the key.
    """
    changes = {name: value for name, value in config.model.items() if name != "name" and value is not None}
    try:
        return config_of(config.model.name, **changes)
    except ValueError as error:
        raise ValueError(f"config.model: {error}") from error


def execution(config: ConfigDict) -> Execution:
    """dtype (auto resolved for the devices here), remat, unroll and attention of a config."""
    dtype = config.dtype
    if dtype == "auto":
        dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return Execution(dtype=dtype, remat=config.remat, unroll=config.unroll, attention=config.attention)
