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
