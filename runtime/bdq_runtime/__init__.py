"""Run an exported model with ONNX Runtime: generation, perplexity, tasks, speed. Needs no torch.

    from bdq_runtime import LanguageModel, TextTokenizer, generate_tokens
    model, tokenizer = LanguageModel("out"), TextTokenizer("out")
    ids = list(generate_tokens(model, tokenizer.chat([{"role": "user", "content": "Hello"}])))
    print(tokenizer.decode(ids))

Nothing is imported before it is used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bdq_runtime.bench import SpeedResult, measure_speed
    from bdq_runtime.generate import generate_tokens
    from bdq_runtime.library import LibraryError, library_path, register
    from bdq_runtime.model import LanguageModel
    from bdq_runtime.perplexity import PerplexityResult, measure_perplexity, windows_of
    from bdq_runtime.session import create_session
    from bdq_runtime.tasks import TaskResult, evaluate_task, load_rows
    from bdq_runtime.tokenizer import TextStream, TextTokenizer

_HOMES = {
    "LanguageModel": "model",
    "LibraryError": "library",
    "PerplexityResult": "perplexity",
    "SpeedResult": "bench",
    "TaskResult": "tasks",
    "TextStream": "tokenizer",
    "TextTokenizer": "tokenizer",
    "create_session": "session",
    "evaluate_task": "tasks",
    "generate_tokens": "generate",
    "library_path": "library",
    "load_rows": "tasks",
    "measure_perplexity": "perplexity",
    "measure_speed": "bench",
    "register": "library",
    "windows_of": "perplexity",
}

__all__ = [
    "LanguageModel",
    "LibraryError",
    "PerplexityResult",
    "SpeedResult",
    "TaskResult",
    "TextStream",
    "TextTokenizer",
    "create_session",
    "evaluate_task",
    "generate_tokens",
    "library_path",
    "load_rows",
    "measure_perplexity",
    "measure_speed",
    "register",
    "windows_of",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
