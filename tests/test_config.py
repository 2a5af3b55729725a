"""Configuration: every key is there and explained, what cannot be is refused, and the shipped configs hold."""

import dataclasses
import importlib.util
import json
import logging
from pathlib import Path

import jax
import pytest
from ml_collections import ConfigDict

from regvit_jax import config as configs
from regvit_jax.config import COMMON, Run, defaults, differences, evaluator, is_runtime, validate
from regvit_jax.evals import EVALUATORS, get
from regvit_jax.optim import OptimConfig, lr_schedule
from regvit_jax.recipes import RECIPES
from regvit_jax.trees import named

SHIPPED = sorted(Path(__file__).parent.parent.glob("configs/*.py"))
SECTIONS = {"": Run, **COMMON, "optim": OptimConfig} | {
    name: configs.recipe_class(defaults(name)).Config for name in RECIPES
}


def changed(**flat):
    """A config that is possible, with dotted keys (written with __) changed."""
    c = defaults("supervised")
    c.data.train, c.data.crop, c.batch_size, c.model.registers, c.eval_every = "npz:data.npz", "none", 8, 2, 0
    c.update_from_flattened_dict({name.replace("__", "."): value for name, value in flat.items()})
    return c


@pytest.mark.parametrize("section", SECTIONS)
def test_every_key_has_a_default_of_its_type_and_a_meaning(section):
    config = defaults(section if section in RECIPES else "supervised")
    values = config if not section else config[section]
    fields = dataclasses.fields(SECTIONS[section])
    assert fields
    for field in fields:
        assert len(field.metadata["doc"]) > 5, field.name
        assert values[field.name] == field.default
        assert not isinstance(field.default, list)
        with pytest.raises(TypeError):
            values[field.name] = object()


@pytest.mark.parametrize("recipe", RECIPES)
def test_there_are_no_other_keys_than_those_of_the_sections(recipe):
    sections = {name: cls for name, cls in SECTIONS.items() if name == recipe or name not in RECIPES}
    names = {f"{s}.{f.name}".lstrip(".") for s, cls in sections.items() for f in dataclasses.fields(cls)}
    assert set(configs.flat(defaults(recipe))) == names | {"schema", "recipe"}


@pytest.mark.parametrize("recipe", RECIPES)
def test_what_a_recipe_wants_otherwise_than_others_is_a_common_key(recipe):
    """Its own keys have their defaults where they are declared; a common key of another type would be refused."""
    wanted, config = configs.recipe_class(defaults(recipe)).DEFAULTS, defaults(recipe)
    assert {name: configs.get(config, name) for name in wanted} == dict(wanted)
    assert not [name for name in wanted if name.startswith(f"{recipe}.")] and config.is_locked
    others = {name: value for name, value in configs.flat(config).items() if name not in wanted}
    for section, cls in SECTIONS.items():
        for field in dataclasses.fields(cls) if section not in RECIPES else ():
            name = f"{section}.{field.name}".lstrip(".")
            assert name in wanted or others[name] == configs.flat({name: field.default})[name], name


def test_unset_keys_have_a_type_too():
    config = defaults("supervised")
    assert config.model.registers is None
    config.model.registers = 4
    with pytest.raises(TypeError):
        config.model.width = "wide"
    with pytest.raises(AttributeError, match='Did you mean "registers"'):
        config.model.register = 4


def test_names_that_do_not_exist_are_told_with_those_that_do():
    with pytest.raises(ValueError, match="unknown recipe 'supervized'; known: .*supervised"):
        defaults("supervized")
    with pytest.raises(ValueError, match="unknown evaluator 'kn'; known: .*knn"):
        evaluator("kn")
    with pytest.raises(ValueError, match="no option 'temprature'; did you mean 'temperature'"):
        evaluator("knn", temprature=0.1)


def test_an_evaluator_section_holds_every_option_of_the_evaluator():
    section = evaluator("knn", every=5, at_start=True, k=(3,))
    fields = {field.name for field in dataclasses.fields(get("knn"))}
    assert set(section) == {"type", "every", "at_start"} | fields
    assert (section.type, section.every, section.at_start, section.k) == ("knn", 5, True, (3,))


def test_explain_shows_every_key_with_its_value():
    config = changed(total_steps=4321)
    config.evals.near = evaluator("knn", k=(7,))
    lines = configs.explain(config).splitlines()
    names = {line.split()[0] for line in lines}
    options = {f"evals.near.{field.name}" for field in dataclasses.fields(get("knn"))}
    assert names == set(configs.flat(changed())) - {"schema", "recipe"} | options
    assert any(line.split()[:2] == ["total_steps", "4321"] for line in lines)
    assert any(line.split()[:2] == ["model.drop_path", "unset"] for line in lines)
    assert any(line.split()[:2] == ["evals.near.k", "(7,)"] for line in lines)


def test_a_config_that_can_be_passes():
    validate(changed(), devices=8)
    validate(changed(batch_size=24, accum_steps=3, groups=8, mesh__data=2, mesh__fsdp=4), devices=8)
    validate(changed(batch_size=3), devices=1)
    validate(changed(data__crop="center", data__cache="device", save_every=0, eval_every=0), devices=8)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"total_steps": 0}, "config.total_steps=0 is not possible: must be at least 1"),
        ({"save_every": -1}, "config.save_every=-1 .* 0 or more"),
        ({"dtype": "float16"}, "config.dtype='float16' .* one of auto, float32, bfloat16"),
        ({"attention": "flash"}, "must be one of auto, cudnn, xla, reference"),
        ({"remat": "some"}, "must be one of none, dots, named, full"),
        ({"xla_flags": "all"}, "must be one of default, none"),
        ({"data__augment_on": "moon"}, "config.data.augment_on='moon' .* one of device, host"),
        ({"data__max_bad": 1.5}, "config.data.max_bad=1.5 is not possible: a share, from 0 to 1"),
        ({"data__train": ""}, "config.data.train='' .* folder:/my/images"),
        ({"data__crop": "rrc", "data__cache": "host"}, "config.data.cache='host' .*set data.crop to center or none"),
        ({"data__crop_ratio": 1.5}, r"config.data.crop_ratio=1.5 .*\(0, 1\]"),
        ({"data__scale": (0.3,)}, r"config.data.scale=\(0.3,\) .* two numbers above 0, low before high, at most 1"),
        ({"data__scale": (0.3, 1.2)}, "config.data.scale"),
        ({"data__ratio": (1.5, 0.5)}, "config.data.ratio=.* low before high"),
        ({"data__mean": (0.5, 0.5)}, "config.data.mean=.* three numbers"),
        ({"data__std": (1.0, 0.0, 1.0)}, "config.data.std=.* above 0"),
        ({"optim__schedule": "step"}, "config.optim.schedule must be one of cosine, linear, constant, got 'step'"),
        ({"optim__b2": 1.0}, "config.optim.b2 must be in"),
        ({"keep_best": "knn/top1", "eval_every": 5}, "config.keep_best='knn/top1' .*config.evals: none"),
        ({"accum_steps": 3}, "config.accum_steps=3 .* must divide batch_size=8"),
        ({"batch_size": 20}, "config.batch_size=20 .* data x fsdp = 8 devices; the nearest that does is 16$"),
        (
            {"accum_steps": 2},
            "each of 2 micro-batches must split over data x fsdp = 8 devices; the nearest that does is 16",
        ),
        ({"groups": 3}, "config.groups=3 .* must divide the 8 images of a micro-batch"),
        ({"groups": 4}, "config.groups=4 .* 1 or a multiple of data x fsdp = 8; the next is 8"),
        ({"mesh__fsdp": 3}, r"config.mesh: data, fsdp, tensor = \[-1, 3, 1\] do not multiply to the 8 devices"),
        (
            {"mesh__data": 2, "mesh__fsdp": 2},
            r"\[2, 2, 1\] do not multiply to the 8 devices here; set one of them to -1",
        ),
        ({"mesh__data": -1, "mesh__fsdp": -1}, "at most one of them -1"),
        ({"mesh__tensor": 0}, "sizes must be positive"),
    ],
)
def test_what_cannot_be_is_refused_with_the_remedy(change, message):
    with pytest.raises(ValueError, match=message):
        validate(changed(**change), devices=8)


RUNTIME = """log_every save_every eval_every keep keep_best remat unroll attention xla_flags compile_cache
data.workers data.cache data.max_bad
    mesh.data mesh.fsdp mesh.tensor mesh.fsdp_min_bytes profile.start profile.steps evals.knn.k evals.linear.l2"""
DECISIVE = """seed total_steps batch_size accum_steps groups dtype init_from model.name model.registers data.train
    data.eval data.crop data.scale optim.lr optim.name supervised.mixup supervised.ema schema recipe"""


@pytest.mark.parametrize("names, runtime", [(RUNTIME, True), (DECISIVE, False)])
def test_which_keys_may_change_when_a_run_is_resumed(names, runtime):
    assert {name: is_runtime(name) for name in names.split()} == dict.fromkeys(names.split(), runtime)


def test_differences_are_parted_into_those_that_change_the_result_and_those_that_do_not():
    new = changed(log_every=7, optim__lr=0.5, mesh__fsdp=4, model__registers=None, data__scale=(0.5, 1.0))
    new.evals.knn = evaluator("knn")
    result, runtime = differences(json.loads(configs.to_json(changed())), json.loads(configs.to_json(new)))
    assert result == {"optim.lr": (1e-3, 0.5), "model.registers": (2, None), "data.scale": ([0.08, 1.0], [0.5, 1.0])}
    assert {"log_every": (50, 7), "mesh.fsdp": (1, 4), "evals.knn.type": (None, "knn")}.items() <= runtime.items()
    assert differences(json.loads(configs.to_json(new)), new) == ({}, {})


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_config_is_possible_documented_and_survives_json(path, caplog):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config()
    assert f"--config=configs/{path.name}" in module.__doc__
    assert config.batch_size % 8 == 0
    assert isinstance(config, ConfigDict) and config.is_locked
    for devices in (1, 8):
        validate(config, devices=devices)
    config.model.num_classes = 10
    recipe = configs.recipe_class(config)(config)
    params, _ = jax.eval_shape(recipe.init, jax.random.key(0), {})
    assert all(recipe.param_groups(path).lr_schedule in recipe.schedules() for path in named(params))
    assert {spec.shape[0] for spec in recipe.input_spec.values()} == {config.batch_size}
    assert recipe.train_flops() > 0
    for options in config.evals.values():
        own = {name: value for name, value in options.items() if name not in ("type", "every", "at_start")}
        get(options.type)(**own)
    text = configs.to_json(config)
    assert differences(json.loads(text), config) == ({}, {}) and json.loads(text)["schema"] == configs.SCHEMA
    config.total_steps = 4
    validate(config, devices=1)
    caplog.set_level(logging.WARNING)
    rate = lr_schedule(config.optim, config.total_steps)
    assert max(float(rate(step)) for step in range(4)) == pytest.approx(config.optim.lr)
    assert config.optim.warmup_steps <= 4 or "clipped to the 4 steps" in caplog.text


def test_the_shipped_configs_and_evaluators_were_found():
    assert {"quickstart", "cifar10_vit"} <= {path.stem for path in SHIPPED}
    assert {"knn", "linear"} <= set(EVALUATORS)
