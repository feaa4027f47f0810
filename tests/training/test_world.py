import pytest
import torch

from pcae_serve.errors import PcaeError
from pcae_training.world import World, join


def test_one_process_needs_no_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with join("cpu") as world:
        assert world == World(torch.device("cpu"), 0, 1)
        assert world.main
        assert not torch.distributed.is_initialized()
        assert world.gather("mine") == ["mine"]
        assert (world.any(True), world.any(False)) == (True, False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("device", ["cuda", "cuda:3"])
def test_no_such_device(device: str) -> None:
    with pytest.raises(PcaeError, match=f"there is no {device} on this machine"), join(device):
        pass


@pytest.mark.parametrize(
    ("asked", "local_rank", "given"), [("cuda", None, 0), ("cuda", "1", 1), ("cuda:1", None, 1)]
)
def test_a_gpu_has_a_number(
    asked: str, local_rank: str | None, given: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    if local_rank:
        monkeypatch.setenv("LOCAL_RANK", local_rank)
    before = torch.get_float32_matmul_precision()
    try:
        with join(asked) as world:
            assert world.device == torch.device("cuda", given)
        assert chosen == [world.device]  # set_device raises on a device without a number
        with (
            pytest.raises(PcaeError, match="there is no cuda:7: number of GPUs: 2"),
            join("cuda:7"),
        ):
            pass
    finally:
        torch.set_float32_matmul_precision(before)
