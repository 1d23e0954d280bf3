"""One process of a calibration: `python parallel_worker.py MODEL_DIR OUT_PREFIX OPTIONS_JSON [FAILING_RANK HOW]`."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import torch

import bdq_export.calibration.output_gradients as output_gradients
import bdq_export.calibration.precision as precision
from bdq_export import parallel
from bdq_export.calibrate import calibrate
from bdq_export.checkpoint import open_checkpoint
from bdq_export.errors import InvalidInputError, PeerFailedError, exit_code_of
from bdq_export.float_model import load_float_model
from bdq_export.options import ExportOptions
from bdq_export.progress import QuietProgress
from bdq_export.resume.codecs import quantized_record
from bdq_export.resume.record import Record
from bdq_runtime.specs import AnyKVQuantization, StaticKVQuantization


def _numbers(cache: AnyKVQuantization) -> list[float]:
    """What calibration finds for the cache of a layer."""
    if isinstance(cache, StaticKVQuantization):
        return [*cache.key_scales.ravel().tolist(), *cache.value_scales.ravel().tolist()]
    return [cache.key_clip, cache.value_clip]


def main() -> int:
    directory, out, options, *failure = sys.argv[1:]
    # Sums of bfloat16 products depend on the shapes of batches far more than those of float32; held inputs, too.
    precision.has_fast_bfloat16 = lambda: False
    output_gradients._HELD = torch.float32
    try:
        with parallel.data_parallel():
            if failure and int(failure[0]) == parallel.rank():
                _fail(failure[1])
            result = _calibrated(Path(directory), ExportOptions(**json.loads(options)))
            Path(f"{out}.{parallel.rank()}").write_bytes(result.to_bytes())
    except PeerFailedError as error:
        return error.exit_code
    except BaseException as error:
        print(f"error: {error}", flush=True)
        return exit_code_of(error)
    return 0


def _calibrated(directory: Path, options: ExportOptions) -> Record:
    checkpoint = open_checkpoint(directory)
    weights = checkpoint.weights()
    found = calibrate(checkpoint, load_float_model(checkpoint, weights), weights, options, QuietProgress())
    quantized = quantized_record(found.quantized)
    values = {
        "transform": found.transform,
        "loss": found.loss,
        "clips": {path: each.clip for path, each in found.activations.items()},
        "kv": [_numbers(each) for each in found.kv.values()],
        "ranges": {path: list(each) for path, each in found.activation_ranges.items()},
    }
    return Record(values, quantized.tensors)


def _fail(how: str) -> None:
    if how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "interrupted":
        raise KeyboardInterrupt
    raise InvalidInputError("a bad file")


if __name__ == "__main__":
    sys.exit(main())
