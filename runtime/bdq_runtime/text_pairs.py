"""Tokens of a context and of what follows it, as lm-evaluation-harness makes them."""

from __future__ import annotations

from bdq_runtime.tokenizer import TextTokenizer


def encode_text(tokenizer: TextTokenizer, text: str) -> list[int]:
    """Tokens of `text` after those the model expects before a text, unless the text begins with such a one itself."""
    prefix = tokenizer.prefix_token()
    return tokenizer.encode(text, begin=prefix is None or not text.startswith(prefix))


def encode_pair(tokenizer: TextTokenizer, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Tokens of a context and of its continuation, at least one of each.

    Spaces at the end of the context belong to the continuation, and the two are tokenized together: what is beyond the
    context's own tokens is the continuation. An empty context is the token that begins texts, else the one that ends
    them.

    Raises:
        ValueError: a continuation that adds no token, or no context and no token to stand for it.
    """
    stripped = context.rstrip()
    before = encode_text(tokenizer, stripped) if stripped else tokenizer.beginning() if context else []
    if before:
        after = encode_text(tokenizer, context + continuation)[len(before) :]
    else:
        before, after = _without_context(tokenizer, context + continuation)
    if not after:
        raise ValueError(f"the continuation {continuation!r} adds no token to its context; leave that row out")
    return before, after


def _without_context(tokenizer: TextTokenizer, text: str) -> tuple[list[int], list[int]]:
    prefix = tokenizer.prefix_id()
    tokens = tokenizer.encode(text)
    if prefix is None:
        raise ValueError(
            f"the context of {text!r} is empty, and tokenizer_config.json of {tokenizer.directory} names no bos_token "
            "or eos_token that could stand for it; give a context"
        )
    return (tokens[:1], tokens[1:]) if tokens[:1] == [prefix] else ([prefix], tokens)
