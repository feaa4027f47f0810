"""The NVIDIA driver: a stand-in library answers as libcuda.so.1 would."""

import ctypes
from typing import Any

import pytest

from pcae_serve.engines import nvidia
from pcae_serve.errors import StartError


class Libcuda:
    """A driver with two GPUs, or with given errors."""

    def __init__(self, init: int = 0, count: int = 2) -> None:
        self.init, self.count = init, count

    def cuInit(self, flags: int) -> int:  # noqa: N802
        assert flags == 0
        return self.init

    def cuDeviceGetCount(self, count: Any) -> int:  # noqa: N802
        count._obj.value = self.count
        return 0

    def cuDeviceGet(self, device: Any, index: int) -> int:  # noqa: N802
        device._obj.value = 40 + index
        return 0

    def cuDeviceGetName(self, name: Any, size: int, device: Any) -> int:  # noqa: N802
        text = f"GPU {device.value}".encode()
        assert len(text) < size
        name.value = text
        return 0


def answers(monkeypatch: pytest.MonkeyPatch, library: Libcuda) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: {"libcuda.so.1": library}[name])


def test_gpus_are_named_by_their_number(monkeypatch: pytest.MonkeyPatch) -> None:
    answers(monkeypatch, Libcuda())
    assert nvidia.list_gpus() == ["GPU 40", "GPU 41"]


@pytest.mark.parametrize("library", [Libcuda(init=100), Libcuda(count=0)])
def test_a_driver_without_a_gpu(monkeypatch: pytest.MonkeyPatch, library: Libcuda) -> None:
    answers(monkeypatch, library)
    with pytest.raises(nvidia.NoGpu, match="finds no GPU"):
        nvidia.list_gpus()


def test_a_machine_without_a_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", missing)
    with pytest.raises(nvidia.NoGpu, match="no NVIDIA driver"):
        nvidia.list_gpus()


def test_a_driver_that_fails_is_not_taken_for_none(monkeypatch: pytest.MonkeyPatch) -> None:
    answers(monkeypatch, Libcuda(init=803))
    with pytest.raises(StartError, match="CUDA error 803") as raised:
        nvidia.list_gpus()
    assert not isinstance(raised.value, nvidia.NoGpu)
