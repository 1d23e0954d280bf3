"""Exported folders as a model of lm-evaluation-harness, by the name `bdq`.

Importing this module registers it: `lm_eval.simple_evaluate(model="bdq", model_args={"pretrained": FOLDER}, ...)`. The
harness's own command has no hook for models from elsewhere; `bdq lm-eval` is that command with this model in it. Needs
no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from lm_eval import utils
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from tqdm import tqdm

from bdq_runtime.completion import complete
from bdq_runtime.folder import ModelFolder
from bdq_runtime.likelihood import MAX_BRANCHES, score_pairs
from bdq_runtime.model import LanguageModel
from bdq_runtime.prefix_reuse import PrefixReuse
from bdq_runtime.text_pairs import encode_text
from bdq_runtime.tokenizer import TextTokenizer

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

_DEFAULT_CONTEXT = 2048  # lm_eval's own, where nothing says how long a text may be
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "top_p": (None, 1, 1.0),
    "top_k": (None, 0, -1),
    "min_p": (None, 0, 0.0),
    "num_beams": (None, 1),
    "repetition_penalty": (None, 1, 1.0),
}
"""Values of generation arguments that change nothing; others are refused."""
_ONLY_FOR_SAMPLES = ("top_p", "top_k", "min_p")

_Request = tuple[tuple[str, str] | None, list[int], list[int]]  # key for lm_eval's cache, context, continuation


@register_model("bdq")
class BdqLM(TemplateLM):
    """A folder written by `bdq-export`, run by ONNX Runtime and the op library."""

    def __init__(
        self,
        pretrained: str,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        threads: int | None = None,
        seed: int = 0,
    ) -> None:
        """Open the model.

        Args:
            pretrained: `OUT.onnx`, or a folder that holds `model.onnx`, with its tokenizer beside it.
            batch_size: above 1, the most continuations in one run, where the graph takes several (those with `bdq`
                attention do). lm_eval says 1 where its user says nothing: that, None and "auto" choose.
            max_batch_size: the most that are chosen; 1 forbids it.
            device: not read: lm_eval says `cuda:0` where its user says nothing. The model runs on the CPU.
            max_length: tokens of a text; None takes the model's context.
            max_gen_toks: tokens to generate where a task does not say it.
            threads: CPU threads; None for all cores.
            seed: of sampling.

        Raises:
            FileNotFoundError: no such model or no tokenizer.
            ValueError: a file that cannot be opened, or an argument out of range.
        """
        super().__init__()
        folder = ModelFolder.of(pretrained)
        self._tokenizer = TextTokenizer(folder.directory)  # first: no model is loaded for want of a tokenizer
        self._model = LanguageModel(folder.model, threads=threads)
        self._max_length = max_length or self._model.context_length or _DEFAULT_CONTEXT
        self._max_gen_toks = max_gen_toks
        self._random = np.random.default_rng(seed)
        self.batch_size = _branches(batch_size, max_batch_size)

    @property
    def eot_token_id(self) -> int:
        """The token that ends texts, which also stands for an empty context where no token begins texts."""
        found = self._tokenizer.token_id("eos_token")
        return self.prefix_token_id if found is None else found

    @property
    def prefix_token_id(self) -> int:
        """The token that stands for an empty context."""
        found = self._tokenizer.prefix_id()
        if found is None:
            raise ValueError(
                f"tokenizer_config.json of {self._tokenizer.directory} names no bos_token or eos_token; add one"
            )
        return found

    @property
    def max_length(self) -> int:
        """Tokens of a text."""
        return self._max_length

    @property
    def max_gen_toks(self) -> int:
        """Tokens to generate where a task does not say it."""
        return self._max_gen_toks

    @property
    def tokenizer_name(self) -> str:
        """Part of the key under which lm_eval caches requests."""
        return str(self._tokenizer.directory.resolve()).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Tokens of a text; without `add_special_tokens`, begun as the model expects it."""
        if add_special_tokens is None:
            return encode_text(self._tokenizer, string)
        return self._tokenizer.encode(string, begin=add_special_tokens)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The source of the template: None is "do not use one", a text chooses one of several by name."""
        if chat_template is False or chat_template is None:
            return None
        return self._tokenizer.template("default" if chat_template is True else chat_template)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as text. Without `add_generation_prompt` it stops where the last message does.

        A template that refuses the system role gets the conversation without it, as lm_eval's own models do.
        """
        try:
            return self._tokenizer.chat_text(chat_history, add_generation_prompt, not add_generation_prompt)
        except ValueError:
            without = [message for message in chat_history if message["role"] != "system"]
            if len(without) == len(chat_history):
                raise
            return self._tokenizer.chat_text(without, add_generation_prompt, not add_generation_prompt)

    def _loglikelihood_tokens(
        self,
        requests: list[_Request],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        found: dict[int, tuple[float, bool]] = {}
        pairs = [(before, after) for _, before, after in requests]
        progress = tqdm(total=len(requests), disable=disable_tqdm, desc="Running loglikelihood requests")
        with progress:
            for index, score in score_pairs(self._model, pairs, self.max_length, self.batch_size):
                found[index] = (score.total, score.greedy)
                key = requests[index][0]
                if key is not None:
                    self.cache_hook.add_partial("loglikelihood", key, found[index])
                progress.update()
        return [found[index] for index in range(len(requests))]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, in windows of the model's context."""
        windows: list[_Request] = []
        counts = []
        for (text,) in (request.args for request in requests):
            rolling = utils.get_rolling_token_windows(
                self.tok_encode(text), self.prefix_token_id, max_seq_len=self.max_length, context_len=1
            )
            of_text = [(None, *utils.make_disjoint_window(window)) for window in rolling]
            windows += of_text
            counts.append(len(of_text))
        scores = iter(self._loglikelihood_tokens(windows, disable_tqdm))
        totals = [float(sum(next(scores)[0] for _ in range(count))) for count in counts]
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Texts that follow prompts, each up to a stop text, the end of the text or its number of tokens."""
        reuse = PrefixReuse(self._model)
        prompts = [self.tok_encode(request.args[0]) for request in requests]
        found: dict[int, str] = {}
        # Sorted, prompts that begin alike (few-shot examples) follow each other.
        for index in tqdm(
            sorted(range(len(requests)), key=prompts.__getitem__), disable=disable_tqdm, desc="Generating"
        ):
            context, arguments = requests[index].args
            found[index] = self._generate(reuse, prompts[index], arguments)
            self.cache_hook.add_partial("generate_until", (context, arguments), found[index])
        return [found[index] for index in range(len(requests))]

    def _generate(self, reuse: PrefixReuse, prompt: Sequence[int], arguments: dict[str, Any]) -> str:
        chosen = dict(normalize_gen_kwargs(arguments, self.max_gen_toks))
        sampled = bool(chosen.pop("do_sample"))
        temperature = float(chosen.pop("temperature", 0.0))  # 0 unless sampled
        count = int(chosen.pop("max_gen_toks"))
        stops = handle_stop_sequences(chosen.pop("until"), eos=self._tokenizer.decode([self.eot_token_id], False))
        for name, value in chosen.items():
            ignored = name in _ONLY_FOR_SAMPLES and not sampled
            if not ignored and value not in _NEUTRAL.get(name, ()):
                raise ValueError(
                    f"generation argument {name} is {value!r}; known are until, max_gen_toks, do_sample and "
                    "temperature: leave it out (--gen_kwargs)"
                )
        room = self.max_length - count
        if room < 1:
            raise ValueError(
                f"{count} tokens are to be generated and a text has at most {self.max_length}; give a smaller "
                "max_gen_toks"
            )
        known = prompt[-room:] or [self.prefix_token_id]
        text = complete(reuse, self._tokenizer, known, count, stops, self._ends(), temperature, self._random)
        return str(postprocess_generated_text(text, stops, None))

    def _ends(self) -> frozenset[int]:
        return self._model.folder.eos_ids() | {self.eot_token_id}


def _branches(batch_size: int | str | None, most: int | None) -> int:
    text = str(batch_size or 1)
    if text.startswith("auto") or text == "1":
        return min(MAX_BRANCHES, most or MAX_BRANCHES)
    if not text.isdecimal():
        raise ValueError(f"batch_size is {batch_size!r}, expected auto or a number of at least 1")
    return int(text)
