"""Compiling, caching and choosing the C kernels."""

import importlib.util
import logging
import stat
import subprocess
import sys

import pytest
import torch

from quire.errors import ConfigError
from quire.kernels import select_kernels
from quire.kernels.cpu import BuildError, CpuKernels

QUICK = ("-O0",)  # the last -O counts; these tests only care that something is compiled


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("QUIRE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "kernels"


def test_the_library_is_compiled_once_into_a_private_directory(cache):
    CpuKernels.build(QUICK)
    (library,) = cache.iterdir()
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700
    before = library.stat().st_mtime_ns
    CpuKernels.build(QUICK)
    assert [file.stat().st_mtime_ns for file in cache.iterdir()] == [before]


def test_processes_may_compile_at_once(cache):
    code = f"from quire.kernels.cpu import CpuKernels; CpuKernels.build({QUICK})"
    processes = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(2)]
    assert [process.wait() for process in processes] == [0, 0]
    assert len(list(cache.iterdir())) == 1


def test_a_directory_that_others_can_write_is_not_used(cache):
    cache.mkdir(parents=True)
    cache.chmod(0o777)
    assert CpuKernels.build(QUICK).silu_and_mul(torch.ones(1, 2)).shape == (1, 1)
    assert not list(cache.iterdir())


def test_without_a_compiler_torch_serves_with_one_warning(cache, monkeypatch, caplog):
    monkeypatch.setenv("CC", "/no/such/compiler")
    with caplog.at_level(logging.WARNING):
        assert select_kernels("cpu").name == "torch"
    (record,) = caplog.records
    assert "\n" not in record.getMessage()
    assert "/no/such/compiler" in record.getMessage()
    with pytest.raises(ConfigError, match="/no/such/compiler"):
        select_kernels("cpu", "cpu")


def test_a_failing_compilation_names_the_error_and_leaves_nothing(cache):
    with pytest.raises(BuildError, match="error"):
        CpuKernels.build(("-Dquire_attention=1+",))
    assert not list(cache.iterdir())


def test_choice_follows_device_and_wish():
    assert select_kernels("cpu").name == "cpu"
    assert select_kernels("cpu", "torch").name == "torch"
    if importlib.util.find_spec("triton"):
        assert select_kernels("cuda").name == "triton"
    with pytest.raises(ConfigError):
        select_kernels("cuda", "cpu")
    with pytest.raises(ConfigError):
        select_kernels("cpu", "cobol")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_torch_and_the_kernels_share_one_openmp():
    CpuKernels.build()
    with open("/proc/self/maps") as maps:
        assert len({line.split()[-1] for line in maps if "libgomp" in line}) <= 1
