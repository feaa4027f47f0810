import pytest
import torch

from pcae_training.decoder import Decoder, default_width
from pcae_training.masking import Mask
from pcae_training.model import ViTConfig

CONFIG = ViTConfig(image_size=16, patch_size=4, width=12, heads=2, classes=0)


def decoder(depth: int = 2) -> Decoder:
    torch.manual_seed(0)
    return Decoder(CONFIG, outputs=5, depth=depth, width=32, heads=2)


def parts() -> tuple[torch.Tensor, Mask]:
    noise = torch.rand(2, 16, generator=torch.Generator().manual_seed(1))
    order = noise.argsort(dim=1)
    return torch.randn(2, 5, 12), Mask(order[:, :4], order[:, 4:9])


def test_as_the_whole_grid_in_order_would_give() -> None:
    """MAE puts every token at its place first; attention does not care about the order."""
    net, (latent, mask) = decoder(), parts()
    positions = net.get_buffer("decoder_pos_embed")[0]
    for i in range(2):
        tokens = {
            int(j): net.decoder_embed(latent[i, 1 + a]) for a, j in enumerate(mask.visible[i])
        }
        tokens |= {int(j): net.mask_token[0, 0] for j in mask.hidden[i]}
        ordered = [net.decoder_embed(latent[i, 0]) + positions[0]]
        ordered += [tokens[j] + positions[1 + j] for j in sorted(tokens)]
        x = torch.stack(ordered)[None]
        for block in net.decoder_blocks:
            x = block(x)
        expected = net.decoder_pred(net.decoder_norm(x))[0, 1:]
        place = {j: row for row, j in enumerate(sorted(tokens))}
        prediction = net(latent, mask.visible, mask.hidden)[i]
        for row, j in enumerate(mask.hidden[i].tolist()):
            torch.testing.assert_close(prediction[row], expected[place[j]], rtol=1e-4, atol=1e-5)


def test_a_prediction_depends_on_its_position() -> None:
    net, (latent, mask) = decoder(), parts()
    there = net(latent, mask.visible, mask.hidden)
    elsewhere = net(latent, mask.visible, mask.hidden.flip(1))
    torch.testing.assert_close(elsewhere.flip(1), there)
    assert not torch.allclose(there[:, 0], there[:, 1])


@pytest.mark.parametrize(
    ("encoder", "width"), [(768, 512), (1024, 512), (384, 256), (192, 128), (64, 32), (8, 32)]
)
def test_width_beside_an_encoder(encoder: int, width: int) -> None:
    assert default_width(encoder) == width
