"""Export a synthetic Llama and print its size and the highest anonymous memory, in all and by stage, as JSON.

python export_peak.py FOLDER LAYERS low|whole [EFFORT]

EFFORT is "fast" unless given, which learns nothing.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from byte_tokenizer import write_tokenizer
from safetensors.torch import save_file

from bdq_export import export
from bdq_export.process_memory import anonymous_bytes, give_back_memory
from bdq_export.progress import QuietProgress

HIDDEN, INTERMEDIATE, VOCAB = 512, 1536, 512
CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}
SHAPES = {
    "self_attn.q_proj": (512, HIDDEN),
    "self_attn.k_proj": (256, HIDDEN),
    "self_attn.v_proj": (256, HIDDEN),
    "self_attn.o_proj": (HIDDEN, 512),
    "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
    "mlp.up_proj": (INTERMEDIATE, HIDDEN),
    "mlp.down_proj": (HIDDEN, INTERMEDIATE),
}


def write_model(folder: Path, layers: int) -> int:
    """A checkpoint in bfloat16; returns its number of parameters."""
    generator = torch.Generator().manual_seed(0)

    def matrix(shape: tuple[int, int]) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) / shape[1] ** 0.5).bfloat16()

    ones = torch.ones(HIDDEN, dtype=torch.bfloat16)
    tensors = {"model.embed_tokens.weight": matrix((VOCAB, HIDDEN)) * HIDDEN**0.5, "model.norm.weight": ones}
    tensors["lm_head.weight"] = matrix((VOCAB, HIDDEN))
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        tensors |= {f"{prefix}{path}.weight": matrix(shape) for path, shape in SHAPES.items()}
        tensors |= {f"{prefix}{norm}_layernorm.weight": ones.clone() for norm in ("input", "post_attention")}
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({**CONFIG, "num_hidden_layers": layers}))
    write_tokenizer(folder)
    return sum(tensor.numel() for tensor in tensors.values())


class Watch(QuietProgress):
    """Samples memory a hundred times a second, by stage."""

    def __init__(self) -> None:
        super().__init__()
        self.peaks: dict[str, int] = {}
        self.name = "before"
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._done.wait(0.01):
            self.peaks[self.name] = max(self.peaks.get(self.name, 0), anonymous_bytes())

    def stop(self) -> None:
        """Sample no more."""
        self._done.set()
        self._thread.join()

    @contextmanager
    def stage(self, name: str, total: float | None = None) -> Iterator[Any]:
        """As the base class."""
        before, self.name = self.name, name
        with super().stage(name, total) as stage:
            yield stage
        self.name = f"after {name}" if before.startswith(("before", "after")) else before


def main() -> None:
    """Run the export."""
    folder, layers, low = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "low"
    effort = sys.argv[4] if len(sys.argv) > 4 else "fast"
    parameters = write_model(folder / "model", layers)
    give_back_memory()  # what is left of it is not the export's
    text = folder / "text.txt"
    text.write_text("".join(chr(32 + (i * i * 7 + i // 5) % 90) for i in range(4000)))
    watch, start = Watch(), time.monotonic()
    export(
        folder / "model",
        folder / "out",
        scheme="w4a4kv4",
        effort=effort,
        calib=str(text),
        calib_samples=4,
        calib_seq_len=64,
        min_top1=0.0,
        low_memory=low,
        progress=watch,
    )
    watch.stop()
    seconds, peak = time.monotonic() - start, max(watch.peaks.values())
    print(json.dumps({"parameters": parameters, "peak": peak, "seconds": seconds, "stages": watch.peaks}))


if __name__ == "__main__":
    main()
