"""Graph passes: from a float ONNX graph to one whose weights stay in low bits.

This file must not `from __future__ import annotations`: the name would hide the module of that name.
"""

from bdq_passes.annotate_linears import AnnotateLinearsPass
from bdq_passes.attach_functions import AttachFunctionsPass
from bdq_passes.graph_pass import GraphPass
from bdq_passes.insert_activation_quantization import InsertActivationQuantizationPass
from bdq_passes.insert_online_transforms import InsertOnlineTransformsPass
from bdq_passes.insert_token_quantization import InsertTokenQuantizationPass
from bdq_passes.insert_weight_quantization import InsertWeightQuantizationPass
from bdq_passes.keep_last_logits import KeepLastLogitsPass
from bdq_passes.levels import Level, LevelError, verify
from bdq_passes.lower_to_gated_low_bit_linear import LowerToGatedLowBitLinearPass
from bdq_passes.lower_to_gather_block_quantized import LowerToGatherBlockQuantizedPass
from bdq_passes.lower_to_kv_attention import LowerToKVAttentionPass
from bdq_passes.lower_to_low_bit_linear import LowerToLowBitLinearPass
from bdq_passes.lower_to_matmul_nbits import LowerToMatMulNBitsPass
from bdq_passes.lower_to_panel_gather import LowerToPanelGatherPass
from bdq_passes.lower_to_qlinear_matmul import LowerToQLinearMatMulPass
from bdq_passes.merge_gate_up import MergeGateUpPass
from bdq_passes.merge_low_bit_linears import MergeLowBitLinearsPass
from bdq_passes.refuse_padding import RefusePaddingPass
from bdq_passes.split_mixed_linears import SplitMixedLinearsPass
from bdq_passes.store_kv_cache_as_integers import StoreKVCacheAsIntegersPass
from bdq_passes.store_scales_as_fp16 import StoreScalesAsFp16Pass
from bdq_passes.store_tied_table_once import StoreTiedTableOncePass
from bdq_passes.strip_metadata import StripMetadataPass

PASSES: dict[str, type[GraphPass]] = {
    item.name: item
    for item in (
        AnnotateLinearsPass,
        KeepLastLogitsPass,
        RefusePaddingPass,
        MergeGateUpPass,
        SplitMixedLinearsPass,
        InsertWeightQuantizationPass,
        InsertActivationQuantizationPass,
        InsertOnlineTransformsPass,
        InsertTokenQuantizationPass,
        LowerToQLinearMatMulPass,
        LowerToGatedLowBitLinearPass,
        LowerToLowBitLinearPass,
        MergeLowBitLinearsPass,
        LowerToMatMulNBitsPass,
        LowerToPanelGatherPass,
        LowerToGatherBlockQuantizedPass,
        StoreScalesAsFp16Pass,
        StoreTiedTableOncePass,
        LowerToKVAttentionPass,
        StoreKVCacheAsIntegersPass,
        AttachFunctionsPass,
        StripMetadataPass,
    )
}
"""Every pass by its name, in the order in which they can run."""

__all__ = [
    "PASSES",
    "AnnotateLinearsPass",
    "AttachFunctionsPass",
    "GraphPass",
    "InsertActivationQuantizationPass",
    "InsertOnlineTransformsPass",
    "InsertTokenQuantizationPass",
    "InsertWeightQuantizationPass",
    "KeepLastLogitsPass",
    "Level",
    "LevelError",
    "LowerToGatedLowBitLinearPass",
    "LowerToGatherBlockQuantizedPass",
    "LowerToKVAttentionPass",
    "LowerToLowBitLinearPass",
    "LowerToMatMulNBitsPass",
    "LowerToPanelGatherPass",
    "LowerToQLinearMatMulPass",
    "MergeGateUpPass",
    "MergeLowBitLinearsPass",
    "RefusePaddingPass",
    "SplitMixedLinearsPass",
    "StoreKVCacheAsIntegersPass",
    "StoreScalesAsFp16Pass",
    "StoreTiedTableOncePass",
    "StripMetadataPass",
    "verify",
]
