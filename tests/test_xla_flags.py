"""Flags for the compiler: appended where they help, never instead of the user's, and only those that XLA knows."""

import logging
import os
import subprocess
import sys

import pytest

from regvit_jax import xla_flags

UNKNOWN = "--xla_gpu_flag_of_another_year=true"


@pytest.fixture
def machine(monkeypatch):
    """What this machine seems to have, and an environment of its own."""

    def seems(gpus=1, plugin="same as jaxlib", flags="", **environment):
        for name in ("JAX_PLATFORMS", "CUDA_VISIBLE_DEVICES", "REGVIT_XLA_FLAGS"):
            monkeypatch.delenv(name, raising=False)
        for name, value in ({"XLA_FLAGS": flags} | environment).items():
            monkeypatch.setenv(name, value)
        files = {"/dev/nvidia[0-9]*": [f"/dev/nvidia{i}" for i in range(gpus)]}
        monkeypatch.setattr(xla_flags.glob, "glob", lambda pattern: files[pattern] if pattern in files else [])
        jaxlib = xla_flags._version("jaxlib")
        versions = {"jaxlib": jaxlib, "jax-cuda13-pjrt": jaxlib if plugin == "same as jaxlib" else plugin}
        monkeypatch.setattr(xla_flags, "_version", lambda package: versions[package] if package in versions else None)

    return seems


@pytest.fixture
def all_known(monkeypatch):
    monkeypatch.setattr(xla_flags, "_accepted", lambda flags: True)


class TestWhatIsAppended:
    def test_one_gpu(self, machine, all_known, caplog):
        machine(gpus=1, flags=" --xla_dump_to=/tmp/x")
        with caplog.at_level(logging.INFO):
            assert xla_flags.append() == xla_flags.GPU
        assert os.environ["XLA_FLAGS"] == "--xla_dump_to=/tmp/x --xla_gpu_enable_triton_gemm=false"
        assert caplog.messages == [
            "xla flags: added --xla_gpu_enable_triton_gemm=false (--config.xla_flags=none keeps them out)"
        ]

    @pytest.mark.parametrize(("gpus", "distributed"), [(8, False), (1, True)])
    def test_several_gpus_here_or_elsewhere(self, machine, all_known, gpus, distributed):
        machine(gpus=gpus)
        assert xla_flags.append(distributed=distributed) == xla_flags.GPU + xla_flags.SEVERAL_GPUS
        assert "--xla_gpu_all_gather_combine_threshold_bytes=134217728" in os.environ["XLA_FLAGS"].split()

    @pytest.mark.parametrize(
        "users", ["--xla_gpu_enable_triton_gemm=true", "--xla_gpu_enable_triton_gemm", "-xla_gpu_enable_triton_gemm=1"]
    )
    def test_what_the_user_set_is_not_touched(self, machine, all_known, users):
        machine(gpus=1, flags=users)
        assert xla_flags.append() == ()
        assert os.environ["XLA_FLAGS"] == users

    def test_a_second_call_adds_nothing(self, machine, all_known):
        machine(gpus=2)
        xla_flags.append()
        before = os.environ["XLA_FLAGS"]
        assert xla_flags.append() == () and os.environ["XLA_FLAGS"] == before

    def test_a_file_of_flags_stays_one(self, machine, all_known):
        """XLA reads XLA_FLAGS as the name of a file, if it starts with no dash."""
        machine(flags="/etc/xla_flags.txt")
        assert xla_flags.append() == ()
        assert os.environ["XLA_FLAGS"] == "/etc/xla_flags.txt"


class TestSwitchedOff:
    @pytest.mark.parametrize(
        ("choice", "environment"),
        [("none", {}), ("default", {"REGVIT_XLA_FLAGS": "none"}), ("none", {"REGVIT_XLA_FLAGS": "default"})],
    )
    def test_by_key_or_variable(self, machine, all_known, choice, environment):
        machine(flags="--a=1", **environment)
        assert xla_flags.append(choice) == ()
        assert os.environ["XLA_FLAGS"] == "--a=1"

    def test_another_word_is_refused(self, machine):
        machine()
        with pytest.raises(ValueError, match="xla_flags='off' is not one of default, none"):
            xla_flags.append("off")
        machine(REGVIT_XLA_FLAGS="0")
        with pytest.raises(ValueError, match="REGVIT_XLA_FLAGS='0'"):
            xla_flags.append()

    def test_nothing_happens_on_a_cpu(self, machine, monkeypatch):
        machine(gpus=0)
        monkeypatch.delenv("XLA_FLAGS")
        monkeypatch.setattr(xla_flags.subprocess, "run", None)  # not even a child process
        assert xla_flags.append() == () and "XLA_FLAGS" not in os.environ


@pytest.mark.parametrize(
    ("gpus", "plugin", "environment", "platform"),
    [
        (1, "same as jaxlib", {}, "cuda"),
        (1, None, {}, "cpu"),  # JAX without its CUDA plugin
        (0, "same as jaxlib", {}, "cpu"),  # the plugin on a machine without a GPU
        (1, "same as jaxlib", {"CUDA_VISIBLE_DEVICES": ""}, "cpu"),
        (1, "same as jaxlib", {"JAX_PLATFORMS": "cpu"}, "cpu"),
        (0, "same as jaxlib", {"JAX_PLATFORMS": "cuda,cpu"}, "cuda"),
        (0, "same as jaxlib", {"JAX_PLATFORMS": "gpu"}, "cuda"),
        (0, None, {"JAX_PLATFORMS": "tpu"}, "tpu"),
    ],
)
def test_platform(machine, gpus, plugin, environment, platform):
    machine(gpus=gpus, plugin=plugin, **environment)
    assert xla_flags.platform() == platform


@pytest.mark.parametrize(
    ("files", "visible", "count"),
    [(8, "0,3", 2), (8, "-1", 0), (8, "0,-1,2", 1), (8, "GPU-5f2a, GPU-77", 2), (1, "0,1", 1)],
)
def test_gpus_that_cuda_will_show(machine, files, visible, count):
    machine(gpus=files, CUDA_VISIBLE_DEVICES=visible)
    assert xla_flags.num_gpus() == count


class TestWhatXlaKnows:
    """With the installed jaxlib. When it drops a flag, runs go on without, and this says which one to remove."""

    def test_every_flag_of_ours(self):
        assert xla_flags._known(xla_flags.GPU + xla_flags.SEVERAL_GPUS) == xla_flags.GPU + xla_flags.SEVERAL_GPUS

    def test_an_unknown_one_is_left_out_and_named(self, machine, monkeypatch, caplog):
        machine(gpus=1)
        monkeypatch.setattr(xla_flags, "GPU", (UNKNOWN, *xla_flags.GPU))
        with caplog.at_level(logging.INFO):
            assert xla_flags.append() == ("--xla_gpu_enable_triton_gemm=false",)
        assert UNKNOWN not in os.environ["XLA_FLAGS"] and f"does not know {UNKNOWN}" in caplog.text

    def test_a_plugin_of_another_version_may_know_others(self, machine, all_known, caplog):
        machine(plugin="0.3.1")
        with caplog.at_level(logging.INFO):
            assert xla_flags.append() == ()
        assert "plugin 0.3.1 is not of jaxlib" in caplog.text and os.environ["XLA_FLAGS"] == ""

    def test_a_patch_of_jaxlib_is_the_same_version(self, machine, all_known, monkeypatch):
        jaxlib = ".".join(xla_flags._version("jaxlib").split(".")[:3])
        machine(plugin=jaxlib + ".1")
        assert xla_flags.append() == xla_flags.GPU

    @pytest.mark.process
    def test_they_count_although_jax_is_already_imported(self):
        script = (
            "import sys; from regvit_jax import xla_flags; assert 'jax' not in sys.modules;"
            "import jax; xla_flags.platform = lambda: 'cuda'; xla_flags.num_gpus = lambda: 1;"
            "xla_flags.GPU = ('--xla_force_host_platform_device_count=3',);"
            "print(len(xla_flags.append()), jax.device_count())"
        )
        environment = os.environ | {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
        child = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
        assert child.stdout.split() == ["1", "3"], child.stderr
