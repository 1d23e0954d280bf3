"""Bits of linears as a table of layers."""

from __future__ import annotations

from bdq_export.commands.layer_bits import layer_table


def names(layer: int, **bits: int) -> dict[str, int]:
    return {f"model.layers.{layer}.mlp.{role}": value for role, value in bits.items()}


def test_neighbouring_layers_of_equal_bits_share_a_row() -> None:
    bits = names(0, gate_up_proj=4, down_proj=8)
    for layer in range(1, 11):
        bits |= names(layer, gate_up_proj=4, down_proj=4)
    bits |= names(11, gate_up_proj=2) | {"lm_head": 8}
    assert layer_table(bits) == (
        ("layers", "gate_up_proj", "down_proj"),
        [("0", "4", "8"), ("1-10", "4", "4"), ("11", "2", "-")],
    )


def test_there_is_no_table_where_all_layers_are_alike() -> None:
    assert layer_table(names(0, a=4, b=4) | names(1, a=4, b=4) | {"lm_head": 8}) == ((), [])
    assert layer_table({}) == ((), [])
