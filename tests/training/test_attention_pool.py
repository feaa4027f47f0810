import torch
from torch import nn

from pcae_training.attention_pool import AttentionPool


def pool() -> AttentionPool:
    torch.manual_seed(0)
    made = AttentionPool(8, heads=2, hidden=20, norm_eps=1e-3, activation="gelu-tanh")
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.5)
    return made


@torch.inference_mode()
def test_it_is_torchs_attention_with_one_query() -> None:
    ours, x = pool(), torch.randn(3, 7, 8)
    theirs = nn.MultiheadAttention(8, 2, batch_first=True)
    assert theirs.in_proj_weight is not None
    theirs.in_proj_weight.copy_(torch.cat([ours.q.weight, ours.kv.weight]))
    theirs.in_proj_bias.copy_(torch.cat([ours.q.bias, ours.kv.bias]))
    theirs.out_proj.load_state_dict(ours.proj.state_dict())
    mixed = theirs(ours.latent.expand(3, 1, 8), x, x)[0][:, 0]
    torch.testing.assert_close(ours(x), mixed + ours.mlp(ours.norm(mixed)))


@torch.inference_mode()
def test_a_token_of_size_s_has_the_attention_of_s_equal_ones() -> None:
    ours, x = pool(), torch.randn(3, 4, 8)
    sizes = torch.tensor([[1, 3, 1, 2]])
    repeated = x.repeat_interleave(sizes[0], dim=1)
    bias = sizes.float().log()[:, None, None]
    torch.testing.assert_close(ours(x, bias), ours(repeated))
    assert not torch.allclose(ours(x), ours(repeated))
