"""The order of the passes: the only module that knows it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bdq_export.errors import InvalidInputError, VerificationError
from bdq_export.options import BDQ, ExportOptions
from bdq_export.quantization import Quantization

if TYPE_CHECKING:
    import onnx_ir as ir

    from bdq_models import Architecture, Dimensions
    from bdq_passes import GraphPass
    from bdq_runtime.packing import QuantizedWeight, QuantSpec

Dump = Callable[[str, "ir.Model"], None]


def quantize_graph(
    model: ir.Model,
    architecture: Architecture,
    dimensions: Dimensions,
    quantization: Quantization,
    options: ExportOptions,
    dump: Dump | None = None,
) -> None:
    """Take `model` from FLOAT to its final level, in place.

    Args:
        model: a float graph in the normal form of `bdq_export.builders`.
        architecture: its family.
        dimensions: its sizes.
        quantization: what calibration decided.
        options: of the export.
        dump: called with the name of each pass and the model after it.

    Raises:
        VerificationError: a pass found the graph other than it must be, or a linear of the model has no node.
    """
    import onnx_ir as ir

    count = _count_linears(model, architecture, dimensions.layers)
    try:
        for item in _prepare(architecture, dimensions, quantization.weights, options, count):
            _apply(item, model, dump)
        for item in _lower(model, architecture, dimensions.layers, quantization, options):
            _apply(item, model, dump)
    except (ir.passes.PassError, ValueError) as error:
        raise VerificationError(f"the graph could not be quantized: {_cause(error)}") from error


def dump_to(folder: Path) -> Dump:
    """A callback that writes the text of the graph after each pass to `folder`, numbered in order.

    Raises:
        InvalidInputError: the folder cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InvalidInputError(f"--dump {folder} cannot be made a folder: {error.strerror}") from None
    written: list[str] = []

    def dump(name: str, model: ir.Model) -> None:
        (folder / f"{len(written):02d}-{name}.txt").write_text(_text(model), encoding="utf-8")
        written.append(name)

    return dump


def _prepare(
    architecture: Architecture,
    dimensions: Dimensions,
    weights: Mapping[str, QuantizedWeight],
    options: ExportOptions,
    count: int,
) -> Sequence[GraphPass]:
    from bdq_passes import (
        AnnotateLinearsPass,
        KeepLastLogitsPass,
        MergeGateUpPass,
        RefusePaddingPass,
        SplitMixedLinearsPass,
    )

    specs = {name: weight.spec for name, weight in weights.items()}

    passes: list[GraphPass] = [AnnotateLinearsPass(expected=count)]
    if not options.full_logits:
        passes.append(KeepLastLogitsPass(linear=architecture.lm_head))
    passes.append(RefusePaddingPass())
    if not options.is_static:  # there, the outputs of gate and up have a scale each
        passes.append(MergeGateUpPass(specs=specs, expected=_merged_mlps(architecture, dimensions.layers, specs)))
    passes += [
        SplitMixedLinearsPass(
            specs=specs,
            columns={
                f"{architecture.layer_path(layer, path)}.weight": dimensions.output_size(path)
                for layer in range(dimensions.layers)
                for path in architecture.linears
            },
        ),
    ]
    return passes


def _lower(
    model: ir.Model, architecture: Architecture, layers: int, quantization: Quantization, options: ExportOptions
) -> Sequence[GraphPass]:
    from bdq_passes import (
        AttachFunctionsPass,
        InsertWeightQuantizationPass,
        Level,
        LowerToGatherBlockQuantizedPass,
        LowerToKVAttentionPass,
        LowerToMatMulNBitsPass,
        LowerToPanelGatherPass,
        LowerToQLinearMatMulPass,
        StoreKVCacheAsIntegersPass,
        StoreScalesAsFp16Pass,
        StoreTiedTableOncePass,
        StripMetadataPass,
    )

    level = Level.QUANTIZED if options.ops == "qdq" else Level.LOWERED
    weights = quantization.weights
    passes: list[GraphPass] = [InsertWeightQuantizationPass(weights=weights, expected=_to_quantize(model, weights))]
    if options.is_static:
        passes += _static(model, quantization)
    else:
        passes += _dynamic(model, architecture, layers, quantization, options)
    if options.ops == "qlinear":
        passes.append(LowerToQLinearMatMulPass())
    passes += [
        LowerToMatMulNBitsPass(accuracy_level=options.accuracy_level),
        LowerToPanelGatherPass(),
        LowerToGatherBlockQuantizedPass(),
    ]
    if level is Level.LOWERED:
        passes.append(StoreScalesAsFp16Pass())
    return [
        *passes,
        StoreTiedTableOncePass(),
        LowerToKVAttentionPass(caches=quantization.dynamic_caches),
        StoreKVCacheAsIntegersPass(caches=quantization.static_caches),
        AttachFunctionsPass(level=level),
        StripMetadataPass(level=level),
    ]


def _static(model: ir.Model, quantization: Quantization) -> Sequence[GraphPass]:
    """Passes that quantize activations with scales fixed at export."""
    from bdq_export.calibration.ranges import merge_ranges
    from bdq_passes import InsertActivationQuantizationPass

    return [InsertActivationQuantizationPass(ranges=merge_ranges(quantization.ranges, _parts_of_linears(model)))]


def _dynamic(
    model: ir.Model, architecture: Architecture, layers: int, quantization: Quantization, options: ExportOptions
) -> Sequence[GraphPass]:
    """Passes that transform and quantize activations when the model runs, and lower what needs a bdq operator."""
    from bdq_passes import (
        InsertOnlineTransformsPass,
        InsertTokenQuantizationPass,
        LowerToGatedLowBitLinearPass,
        LowerToLowBitLinearPass,
        MergeLowBitLinearsPass,
    )

    parts = _parts_of_linears(model)
    everything = options.ops == BDQ
    pairs = [tuple(architecture.layer_path(layer, path) for path in _gate_up(architecture)) for layer in range(layers)]
    gated = [pair for pair in pairs if pair in parts.values() and (everything or quantization.needs_bdq(pair[0]))]
    return [
        InsertOnlineTransformsPass(transforms=quantization.online_of(parts)),
        InsertTokenQuantizationPass(activations=quantization.activations_of(parts)),
        LowerToGatedLowBitLinearPass(expected=len(gated), everything=everything),
        LowerToLowBitLinearPass(everything=everything),
        MergeLowBitLinearsPass(),
    ]


def _parts_of_linears(model: ir.Model) -> dict[str, tuple[str, ...]]:
    """Name of each linear node -> canonical paths of its parts."""
    from bdq_passes import annotations

    return {str(node.name): annotations.parts(node) for node in annotations.with_role(model, annotations.LINEAR)}


def _gate_up(architecture: Architecture) -> tuple[str, str]:
    """Paths of the gate and the up projection in a layer: down_proj is linear in the second one."""
    up = architecture.edge("mlp_middle").producers[0]
    (gate,) = (path for path in architecture.edge("mlp_in").consumers if path != up)
    return gate, up


def _apply(item: GraphPass, model: ir.Model, dump: Dump | None) -> None:
    item(model)
    if dump is not None:
        dump(item.name, model)


def _count_linears(model: ir.Model, architecture: Architecture, layers: int) -> int:
    """Linear nodes of the float graph, after checking that their parts are exactly the family's linears."""
    from bdq_passes import annotations

    expected = {
        architecture.lm_head,
        *(architecture.layer_path(layer, path) for layer in range(layers) for path in architecture.linears),
    }
    nodes = [annotations.parts(node) for node in model.graph if annotations.parts(node)]
    found = {part for parts in nodes for part in parts}
    if found != expected:
        missing, extra = sorted(expected - found), sorted(found - expected)
        raise VerificationError(
            f"the float graph lacks {len(missing)} linears of the model (first: {missing[:1]}) and has {len(extra)} "
            f"others (first: {extra[:1]}); please report it"
        )
    return len(nodes)


def _merged_mlps(architecture: Architecture, layers: int, specs: Mapping[str, QuantSpec]) -> int:
    """Layers whose gate and up projection are quantized alike."""
    paths = _gate_up(architecture)
    found = ({specs.get(f"{architecture.layer_path(layer, path)}.weight") for path in paths} for layer in range(layers))
    return sum(len(each) == 1 and None not in each for each in found)


def _to_quantize(model: ir.Model, weights: Mapping[str, QuantizedWeight]) -> int:
    """Linear nodes that must come out quantized."""
    from bdq_passes import annotations

    return sum(
        all(f"{part}.weight" in weights for part in annotations.parts(node)) or annotations.tied(node) in weights
        for node in annotations.with_role(model, annotations.LINEAR)
    )


def _cause(error: BaseException) -> str:
    """The innermost message of a chain: onnx_ir wraps what a pass raises."""
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error)


def _text(model: ir.Model) -> str:
    """Inputs, outputs and nodes of the main graph, a line each; weights by name and shape only."""
    graph = model.graph
    lines = [f"input {value}" for value in graph.inputs]
    lines += [f"initializer {value.name}: {value.type}{value.shape}" for value in graph.initializers.values()]
    lines += [str(node) for node in graph]
    lines += [f"output {value}" for value in graph.outputs]
    return "\n".join(lines) + "\n"
