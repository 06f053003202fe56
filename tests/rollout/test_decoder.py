from __future__ import annotations

import copy

import pytest
import torch
from transformers import LlamaConfig, LlamaModel

from rlpipe.policy.attention import PACKED
from rlpipe.policy.janus import JanusPolicy
from rlpipe.rollout.decoder import Decoder


def random_ids(policy: JanusPolicy, rows: int, length: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rows * 1000 + length)
    return torch.randint(8, policy.janus.lm_head.out_features, (rows, length), generator=generator)


@torch.no_grad()
def full_hidden(policy: JanusPolicy, ids: list[int] | torch.Tensor) -> torch.Tensor:
    """Last hidden states [T, D] of one sequence by transformers' own forward."""
    ids = torch.as_tensor(ids)[None]
    return policy.hidden(policy.embed_text(ids), torch.arange(ids.shape[1])[None])[0]


def with_language_model(policy: JanusPolicy, **changes) -> JanusPolicy:
    """The same policy with another random language model."""
    torch.manual_seed(1)
    other = copy.deepcopy(policy)
    config = LlamaConfig(**{**policy.janus.config.text_config.to_dict(), **changes})
    config._attn_implementation = PACKED
    other.janus.model.language_model = LlamaModel(config).eval()
    return other


def check_against_full_forward(policy: JanusPolicy, tolerance: float = 1e-5) -> None:
    """Prefill, a block of five and single steps give the full forward's hidden states."""
    decoder = Decoder(policy)
    ids = random_ids(policy, 3, 16)
    full = torch.stack([full_hidden(policy, row) for row in ids])
    cache, hidden = decoder.prefill(ids[:, :6].tolist(), slots=16)
    torch.testing.assert_close(hidden, full[:, 5], atol=tolerance, rtol=tolerance)
    positions = torch.arange(16).expand(3, -1)
    with torch.no_grad():
        embeddings = policy.embed_text(ids)
    hidden = decoder.extend(cache, embeddings[:, 6:11], positions[:, 6:11])
    torch.testing.assert_close(hidden, full[:, 10], atol=tolerance, rtol=tolerance)
    for t in range(11, 16):
        hidden = decoder.extend(cache, embeddings[:, t : t + 1], positions[:, t : t + 1])
        torch.testing.assert_close(hidden, full[:, t], atol=tolerance, rtol=tolerance)


def test_hidden_states_equal_those_of_the_full_forward(tiny_policy):
    check_against_full_forward(tiny_policy)


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_grouped_query_attention_is_exact(tiny_policy, kv_heads):
    check_against_full_forward(
        with_language_model(tiny_policy, num_attention_heads=4, num_key_value_heads=kv_heads, head_dim=16)
    )


def test_a_head_size_that_does_not_divide_the_width_and_a_rescaled_rotation_are_exact(tiny_policy):
    rotation = {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 128,
    }
    check_against_full_forward(with_language_model(tiny_policy, head_dim=24, rope_parameters=rotation))


def test_bfloat16_stays_near_float32(tiny_policy):
    ids = random_ids(tiny_policy, 2, 12)
    exact = torch.stack([full_hidden(tiny_policy, row)[-1] for row in ids])
    low = copy.deepcopy(tiny_policy)
    low.janus.to(torch.bfloat16)
    decoder = Decoder(low)
    cache, _ = decoder.prefill(ids[:, :10].tolist(), slots=12)
    for t in (10, 11):
        hidden = decoder.extend(cache, low.embed_text(ids[:, t : t + 1]), torch.full((2, 1), t))
    assert hidden.dtype == torch.bfloat16
    assert float((hidden.float() - exact).abs().max()) < 0.15


def test_a_row_does_not_feel_the_padding_of_a_batch_of_unequal_lengths(tiny_policy):
    decoder = Decoder(tiny_policy)
    rows = [random_ids(tiny_policy, 1, length)[0].tolist() for length in (4, 9, 7)]
    cache, hidden = decoder.prefill(rows, slots=10)
    lengths = torch.tensor([len(row) for row in rows])
    tokens = torch.tensor([[9], [10], [11]])
    stepped = decoder.extend(cache, tiny_policy.embed_text(tokens), lengths[:, None])
    for index, row in enumerate(rows):
        full = full_hidden(tiny_policy, [*row, int(tokens[index])])
        torch.testing.assert_close(hidden[index], full[-2], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(stepped[index], full[-1], atol=1e-5, rtol=1e-5)


def test_padding_inside_a_block_and_a_gap_in_the_positions_are_exact(tiny_policy):
    decoder = Decoder(tiny_policy)
    cache, _ = decoder.prefill([[8, 9, 10], [11, 12, 13]], slots=7)
    block = torch.tensor([[14, 15, 16, 17], [14, 0, 0, 17]])
    valid = torch.tensor([[True, True, True, True], [True, False, False, True]])
    positions = torch.tensor([[3, 4, 5, 9], [3, 4, 5, 9]])
    hidden = decoder.extend(cache, tiny_policy.embed_text(block), positions, valid)
    for row, (ids, places) in enumerate(
        [([8, 9, 10, 14, 15, 16, 17], [0, 1, 2, 3, 4, 5, 9]), ([11, 12, 13, 14, 17], [0, 1, 2, 3, 9])]
    ):
        with torch.no_grad():
            full = tiny_policy.hidden(tiny_policy.embed_text(torch.tensor([ids])), torch.tensor([places]))
        torch.testing.assert_close(hidden[row], full[0, -1], atol=1e-5, rtol=1e-5)


def test_selected_rows_go_on_as_if_decoded_alone(tiny_policy):
    decoder = Decoder(tiny_policy)
    rows = [[8, 9, 10], [11, 12, 13, 14, 15]]
    cache, _ = decoder.prefill(rows, slots=5)
    picked = cache.select(torch.tensor([1, 0, 0]), slots=6)
    tokens = torch.tensor([[20], [21], [22]])
    hidden = decoder.extend(picked, tiny_policy.embed_text(tokens), torch.tensor([[5], [3], [3]]))
    for index, row in enumerate((rows[1], rows[0], rows[0])):
        full = full_hidden(tiny_policy, [*row, int(tokens[index])])
        torch.testing.assert_close(hidden[index], full[-1], atol=1e-5, rtol=1e-5)


def test_refresh_takes_over_new_weights_and_nothing_of_the_old(tiny_policy):
    policy = copy.deepcopy(tiny_policy)
    decoder = Decoder(policy)
    _, before = decoder.prefill([[8, 9, 10]], slots=3)
    places = [decoder.norm.data_ptr(), decoder.code_table.data_ptr(), decoder.layers[0].norm.data_ptr()]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in policy.parameters():
            weight.add_(0.05 * torch.randn(weight.shape, generator=generator))
    decoder.refresh()
    _, after = decoder.prefill([[8, 9, 10]], slots=3)
    fresh = Decoder(policy)
    assert float((after - before).abs().max()) > 1e-2
    assert torch.equal(after, fresh.prefill([[8, 9, 10]], slots=3)[1])
    assert torch.equal(decoder.code_table, fresh.code_table)
    assert torch.equal(decoder.image_logits(after), fresh.image_logits(after))
    assert torch.equal(decoder.text_logits(after), fresh.text_logits(after))
    assert places == [decoder.norm.data_ptr(), decoder.code_table.data_ptr(), decoder.layers[0].norm.data_ptr()]
    torch.testing.assert_close(after[0], full_hidden(policy, [8, 9, 10])[-1], atol=1e-5, rtol=1e-5)


def test_a_full_cache_is_refused(tiny_policy):
    decoder = Decoder(tiny_policy)
    cache, _ = decoder.prefill([[8, 9, 10]], slots=3)
    with pytest.raises(ValueError, match="4 slots asked of a cache of 3"):
        decoder.extend(cache, tiny_policy.embed_text(torch.tensor([[8]])), torch.tensor([[3]]))
