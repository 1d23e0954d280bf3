"""Checks before the work starts: is there enough memory and disk, and is OUT a sensible place?

The estimate is an upper bound made of what an export holds at the same time. With P parameters, E of them in the
embedding (and as many again in lm_head), b bytes a stored value of the checkpoint, `tokens` = samples x length:

    memory =   700 MB                       Python, torch, transformers, onnxruntime
             + 4 P                          float32 weights (pages mapped from the file when b = 4)
             + 4 P                          the float graph inside onnxruntime while it is checked against torch
             + 4 P + 4 E                    folded weights and the untied lm_head, unless --transform none
             + P                            quantized weights, one byte a value until they are packed
             + 3 * 4 * tokens * hidden      inputs and outputs of one block, float and quantized, with calibration
             + 6 * 8 * largest K squared    Hessians of one block with factor, inverse and work space, with gptq
             + 2 P + 2 * tokens * hidden    codes and the teacher's states in bfloat16, where scales are learned;
             + 20 S                         S numbers that are learned there: value, gradient, two moments, best so far,
             + 8 * length * layers * hidden     the inputs of all blocks for two sequences;
             + 32 * 128 * vocab             and logits there, 128 rows eight times over,
             + 8 * length * (20 hidden + 8 intermediate)    and what one block keeps for its gradient;
                                            these two, and lm_head in bfloat16, where rotations are
             + 4 * tokens * hidden + that    float inputs of a block, where --transform kronecker alone is learned
             + 2 * layers * 2048 * hidden   inputs of all blocks, with --target-bits
             + outputs * min(outputs, 2048)    a factor for each linear, where GPTQ weighs outputs; before there are
             + 2 * layers * tokens * hidden - 5 P  codes, inputs of all blocks: if that is more than learning takes
             + 8 * length * vocab           logits of one sequence

Where that is more than there is, weights are held one block at a time, with B parameters in a block, and the lines that
have P or 4 E become

             + 24 B                         folding in float64, the block that runs, a second model beside it
             + 20 E, 28 E where untied      embedding and lm_head, float and quantized, and what making one takes
             + P * bits / 8                 inside onnxruntime when the file is verified, with stock operators
             + 4 E                          unless --transform none
             + 4 P                          where rotations are learned

without the 2 P: learned scales make what products read of one block at a time.

    disk   =   4 P + 4 E                    the float graph that is checked against torch
             + P * bits / 8 + P / 8         packed weights, scales and zero points
             + 2 E                          embedding and lm_head at 8 bits
             + 64 MB                        tokenizer, reports, graph
             + 2.5 P                        codes, one block at a time; and 2 P while text is sampled
             + the two lines of GPTQ's outputs, instead of in memory
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path

from bdq_export import parallel
from bdq_export.calibration.output_groups import GPTQ_SEQUENCES, group_sizes
from bdq_export.checkpoint.directory import Checkpoint
from bdq_export.errors import InvalidInputError, ResourceError, UsageError
from bdq_export.options import BDQ, KRONECKER, SPIN, ExportOptions
from bdq_export.quantize.target_bits import GRADIENT_TOKENS
from bdq_export.scheme import QuantScheme
from bdq_models import Dimensions

_MEGABYTE = 10**6
_LIBRARIES = 700 * _MEGABYTE
_SIDE_FILES = 64 * _MEGABYTE
_BLOCK_BYTES = 24
_TABLE_BYTES, _MADE_TABLE_BYTES = 8, 12
_LEARNED_BYTES = 20
_CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Estimate:
    """What an export needs at most.

    Attributes:
        memory_bytes: peak resident memory of the process.
        disk_bytes: free space where OUT is written, temporary files included.
        streamed: whether weights are held one block at a time.
    """

    memory_bytes: int
    disk_bytes: int
    streamed: bool = False


def estimate(dimensions: Dimensions, parameters: int, options: ExportOptions, streamed: bool = False) -> Estimate:
    """The formulas at the top of this module; pure.

    Args:
        dimensions: sizes of the model.
        parameters: values in its tensors.
        options: of the export.
        streamed: weights are held one block at a time.
    """
    embedding = dimensions.vocab_size * dimensions.hidden_size
    bits = QuantScheme.parse(options.scheme).weight_bits if options.target_bits is None else options.target_bits
    memory = _LIBRARIES + 8 * options.seq_len * dimensions.vocab_size
    if streamed:
        ends = embedding if dimensions.tied else 2 * embedding
        memory += _BLOCK_BYTES * (parameters - ends) // dimensions.layers
        memory += _TABLE_BYTES * ends + _MADE_TABLE_BYTES * embedding
        memory += int(parameters * bits / 8) if options.linear_ops != BDQ else 0
    else:
        memory += 9 * parameters
    if options.transform != "none":
        memory += 4 * embedding + (0 if streamed else 4 * parameters)
    if options.transform != "none" or options.weights == "gptq":
        memory += 12 * options.samples * options.seq_len * dimensions.hidden_size
    if options.weights == "gptq":
        memory += 48 * max(dimensions.intermediate_size, dimensions.heads * dimensions.head_dim) ** 2
    gradient = 4 * 2 * options.seq_len * (20 * dimensions.hidden_size + 8 * dimensions.intermediate_size)
    if options.transform == KRONECKER:
        memory += 4 * options.samples * options.seq_len * dimensions.hidden_size
        memory += 0 if options.learns else gradient
    learned = 0
    if options.learns:
        learned += 0 if streamed else 2 * parameters
        learned += 2 * options.samples * options.seq_len * dimensions.hidden_size
        learned += _LEARNED_BYTES * _learned_numbers(dimensions, options)
        learned += 4 * 2 * options.seq_len * dimensions.layers * dimensions.hidden_size
    elif options.transform == SPIN:
        learned += 2 * embedding + (4 * parameters if streamed else 0)
    if options.learns or options.transform == SPIN:
        learned += 8 * 4 * 128 * dimensions.vocab_size + gradient
    inputs, factors = _curvature_bytes(dimensions, options) if options.weighs_outputs else (0, 0)
    # Inputs of all blocks are gone before there are quantized weights, and factors before scales are learned.
    memory += max(learned, 0 if streamed else factors + max(0, inputs - 5 * parameters))
    if options.target_bits is not None:
        memory += 2 * dimensions.layers * GRADIENT_TOKENS * dimensions.hidden_size
    packed = int(parameters * bits / 8) + parameters // 8 + 2 * embedding
    disk = 4 * parameters + 4 * embedding + packed + _SIDE_FILES
    if streamed:
        disk += 5 * parameters // 2 + (2 * parameters if options.calib == "self" else 0)
        disk += inputs + factors
    return Estimate(memory_bytes=memory, disk_bytes=disk, streamed=streamed)


def _learned_numbers(dimensions: Dimensions, options: ExportOptions) -> int:
    """Scales of the weights of blocks, diagonals in front of them, gains of norms (at most four a block)."""
    scales = sum(outputs * -(-inputs // (options.scale_block or inputs)) for outputs, inputs in _linears(dimensions))
    queries = dimensions.heads * dimensions.head_dim
    diagonals = 2 * dimensions.hidden_size + queries + dimensions.intermediate_size
    return dimensions.layers * (scales + diagonals + 4 * dimensions.hidden_size)


def _curvature_bytes(dimensions: Dimensions, options: ExportOptions) -> tuple[int, int]:
    """Of the inputs of all blocks, and of a float16 factor for each group of outputs of each linear."""
    factors = sum(size * size for outputs, _ in _linears(dimensions) for size in group_sizes(outputs))
    tokens = min(options.samples, GPTQ_SEQUENCES) * options.seq_len
    return dimensions.layers * 2 * tokens * dimensions.hidden_size, dimensions.layers * factors


def _linears(dimensions: Dimensions) -> tuple[tuple[int, int], ...]:
    """Outputs and inputs of q, k, v, o, gate, up and down."""
    hidden, mlp = dimensions.hidden_size, dimensions.intermediate_size
    queries, keys = dimensions.heads * dimensions.head_dim, dimensions.kv_heads * dimensions.head_dim
    attention = ((queries, hidden), (keys, hidden), (keys, hidden), (hidden, queries))
    return (*attention, (mlp, hidden), (mlp, hidden), (hidden, mlp))


def check_resources(checkpoint: Checkpoint, out: Path, options: ExportOptions, low_memory: bool = False) -> Estimate:
    """Decide whether weights are held all or one block at a time, and refuse what memory or disk cannot suffice for.

    Args:
        checkpoint: the model.
        out: as the user gave it; its nearest existing folder tells the disk.
        options: of the export.
        low_memory: one block at a time, whatever memory there is.

    Returns:
        The estimate, for the report.

    Raises:
        ResourceError: names what is needed, what is there and what to do.
    """
    memory = available_memory()
    # Each process holds weights of its own (docs/scale.md).
    processes = parallel.local_size()
    need, least = (estimate(checkpoint.dimensions, checkpoint.parameters, options, each) for each in (False, True))
    if low_memory or (memory is not None and need.memory_bytes * processes > memory):
        # A tiny model's blocks are smaller than what one at a time takes beside them.
        need = least if low_memory or least.memory_bytes < need.memory_bytes else need
    wanted = need.memory_bytes * processes
    if memory is not None and wanted > memory:
        held = ", with the weights of one block at a time," if need.streamed else ""
        cheaper = _cheaper(checkpoint, options, memory // processes)
        raise ResourceError(
            f"this export needs about {_shown(wanted)} of memory{held} but {_shown(memory)} are available; "
            f"close other programs{'' if cheaper is None else f', use {cheaper}'}, or take a larger machine"
        )
    folder = existing_folder(out)
    disk = shutil.disk_usage(folder).free
    if need.disk_bytes > disk:
        raise ResourceError(
            f"this export needs about {_shown(need.disk_bytes)} on the disk of {folder} but {_shown(disk)} are free; "
            "free some or choose an OUT on another disk"
        )
    return need


def _cheaper(checkpoint: Checkpoint, options: ExportOptions, memory: int) -> str | None:
    """Options with which the export fits `memory`, those that change least first; None where it does not.

    Weights one block at a time need not be asked for: `check_resources` has tried that.
    """
    plain = {"transform": "none", "weights": "rtn"}
    ways: list[tuple[str, dict[str, str]]] = [("--transform none --weights rtn", plain)]
    if options.learns:
        fast = {"effort": "fast", "loss": "kl"}
        ways = [("--effort fast", fast), (f"--effort fast {ways[0][0]}", {**fast, **plain})]
    for words, changes in ways:
        try:
            changed = replace(options, loss_delta=0.5, loss_target="teacher", **changes)  # type: ignore[arg-type]
        except UsageError:  # not together with what else was asked for
            continue
        needs = (estimate(checkpoint.dimensions, checkpoint.parameters, changed, each) for each in (False, True))
        if min(need.memory_bytes for need in needs) <= memory:
            return words
    return None


def existing_folder(path: Path) -> Path:
    """`path` if it is a folder, else the nearest one around it."""
    return next(parent for parent in (path.absolute(), *path.absolute().parents) if parent.is_dir())


def check_separate(model_dir: Path, out: Path) -> None:
    """Refuse an OUT that would be mixed with the model it is made from.

    Args:
        model_dir: the folder of the model (or its .gguf file).
        out: a name ending in `.onnx`, written with its side files into its folder, or a folder.

    Raises:
        InvalidInputError: OUT is the model folder, inside it, or a folder around it.
    """
    folder = (out.parent if out.suffix.lower() == ".onnx" else out).resolve()
    model = model_dir.resolve()
    if folder == model or model in folder.parents:
        raise InvalidInputError(f"the output {out} is inside the model folder {model_dir}; choose another folder")
    if out.suffix.lower() != ".onnx" and folder in model.parents:
        raise InvalidInputError(f"the output folder {out} holds the model {model_dir}; choose another folder")


def available_memory() -> int | None:
    """Bytes that this process may still allocate: of the machine, its cgroup and its address space limit.

    None where nothing tells.
    """
    limits = [limit for limit in (_machine_memory(), _cgroup_memory(_CGROUP), _address_space()) if limit is not None]
    return min(limits, default=None)


def _machine_memory() -> int | None:
    try:
        import psutil
    except ImportError:
        return None
    return int(psutil.virtual_memory().available)


def _cgroup_memory(root: Path) -> int | None:
    """What the cgroup (version 2) leaves, its reclaimable file cache counted as free; None without a limit."""
    try:
        limit = (root / "memory.max").read_text().strip()
        used = int((root / "memory.current").read_text())
        fields = (line.split() for line in (root / "memory.stat").read_text().splitlines())
        cache = next((int(value) for name, value in fields if name == "inactive_file"), 0)
        return None if limit == "max" else max(0, int(limit) - used + cache)
    except (OSError, ValueError):
        return None


def _address_space() -> int | None:
    """What `ulimit -v` leaves; None without a limit or on Windows."""
    try:
        import resource
    except ImportError:
        return None
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    return None if limit == resource.RLIM_INFINITY else limit


def _shown(size: int) -> str:
    return f"{size / 1e9:.1f} GB"
