from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from typing import Any

import emulator
import pytest
import tiny as tiny_material
from exact_sae import Put

# Models here are so tiny that threads of torch would only wait for each other; set before torch is imported, and for
# the commands that tests run too, which must compute as this process does to give the same bytes.
os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"

# The core as on a processor with less, for `make test-dispatch`.
if "STS_TEST_INSTRUCTION_SET" in os.environ:
    from sts_fast.ops import _cpu

    _cpu.set_instruction_set(os.environ["STS_TEST_INSTRUCTION_SET"])


# What is imported and collected lives as long as the tests do: the garbage collector, which would go through it again
# and again, costs a third of collecting, and later some of every test that makes much garbage.
def pytest_collection() -> None:
    gc.disable()


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


@pytest.fixture(params=["emulator", "cuda"])
def gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A torch.device of the CUDA ops: a GPU, or the CPU with their source compiled for an emulated one."""
    torch = pytest.importorskip("torch")
    from sts_fast.ops import cuda_kernels

    if request.param == "cuda":
        reason = cuda_kernels.missing_reason()
        if reason is not None:
            pytest.skip(reason)
        yield torch.device("cuda:0")
        return
    module = emulator.load()
    if module is None:
        pytest.skip("no C++ compiler to build the emulator with")
    monkeypatch.setattr(cuda_kernels, "kernels", module)
    yield torch.device("cpu")


@pytest.fixture
def rows_on(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], Any]:
    """A function that puts rows on the GPU; the emulated one takes the CPU's tensors for its own."""
    import torch

    from sts_fast.ops import backend

    if gpu.type == "cpu":
        monkeypatch.setattr(backend, "device_of", lambda acts: gpu if isinstance(acts, torch.Tensor) else None)
        monkeypatch.setattr(backend, "kernels_serve", lambda values: isinstance(values, torch.Tensor))
    return lambda acts: torch.as_tensor(acts).to(gpu)


@pytest.fixture(params=["core", "torch"])
def put(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Put:
    """Puts rows where the core computes, or where plain torch does: it takes the CPU's tensors for a device's."""
    if request.param == "core":
        return Put(as_tensors=False)
    torch = pytest.importorskip("torch")
    from sts_fast.ops import backend

    monkeypatch.setattr(backend, "device_of", lambda acts: acts.device if isinstance(acts, torch.Tensor) else None)
    return Put(as_tensors=True)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tiny_material.Tiny:
    """A tiny random model with SAEs of every architecture, a tuned model, a training set and domains."""
    return tiny_material.make(tmp_path_factory.mktemp("tiny"))
