"""Free channels and the consumers' channels: expand, its adjoint, and the tie of RoPE pairs."""

from __future__ import annotations

import pytest
import torch

from bdq_export.transform.channels import consumer_channels, expand, is_tied, reduce, tie


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3", "gemma3"])
@pytest.mark.parametrize("edge", ["attention_in", "value", "key_query", "mlp_in", "mlp_middle"])
def test_reduce_is_the_adjoint_of_expand(family, edge, tiny_model):
    tiny = tiny_model(family)
    row = tiny.architecture.edge(edge)
    free = torch.rand(tiny.dimensions.free_channels(row))
    consumer = torch.rand(consumer_channels(row, tiny.dimensions))
    expanded = expand(row, tiny.dimensions, free)
    assert expanded.shape == consumer.shape
    inner = free @ reduce(row, tiny.dimensions, consumer)
    torch.testing.assert_close(expanded @ consumer, inner, rtol=1e-5, atol=1e-5)


def test_expand_repeats_over_the_group(tiny_model):
    """9 query heads on 3: query heads 0, 1, 2 read KV head 0."""
    tiny = tiny_model("llama")
    heads = expand(tiny.architecture.edge("value"), tiny.dimensions, torch.arange(48.0)).reshape(9, 16)
    for head in range(9):
        assert torch.equal(heads[head], torch.arange(16.0) + 16 * (head // 3))


def test_tie_makes_pairs_equal_and_keeps_the_rest(tiny_model):
    tiny = tiny_model("phi3")
    edge = tiny.architecture.edge("key_query")
    scale = torch.rand(32).double() + 0.1
    tied = tie(edge, tiny.dimensions, scale).reshape(2, 16)
    assert torch.equal(tied[:, :6], tied[:, 6:12])
    assert torch.equal(tied[:, 12:], scale.reshape(2, 16)[:, 12:])
    torch.testing.assert_close(tied.log().sum(), scale.log().sum())
    torch.testing.assert_close(tie(edge, tiny.dimensions, tied.reshape(-1)), tied.reshape(-1))
    assert is_tied(edge, tiny.dimensions, tied.reshape(-1))
    assert is_tied(edge, tiny.dimensions, tie(edge, tiny.dimensions, torch.rand(32) + 0.1))
    assert not is_tied(edge, tiny.dimensions, scale)
    untied = tiny.architecture.edge("value")
    assert tie(untied, tiny.dimensions, scale) is scale
