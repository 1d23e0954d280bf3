"""tokenizer.json from the vocabulary of a GGUF file.

Two kinds: byte-level BPE (`gpt2`) carries its merges, but how text is split before BPE only by a name;
SentencePiece BPE (`llama`) carries scores instead of merges. SentencePiece joins the neighbours whose union has the
best score, so the merges are all splits of each piece into two pieces, ordered by the score of the piece.
(transformers' own conversion of both kinds of file is wrong: it drops the digit splitting of SmolLM2 and the
merges of Gemma 3.)
"""

from __future__ import annotations

from typing import Any

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from bdq_export.checkpoint.gguf_config import special_token_ids
from bdq_export.checkpoint.gguf_file import GgufFile
from bdq_export.errors import InvalidInputError, UnsupportedModelError

_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4
_SPACE = "▁"
_LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def make_tokenizer(gguf: GgufFile) -> Tokenizer:
    """The tokenizer of `gguf`.

    Raises:
        InvalidInputError: vocabulary missing or inconsistent.
        UnsupportedModelError: a kind of tokenizer that is not known; a guess would be silently wrong.
    """
    tokens, kinds = _vocabulary(gguf)
    model = gguf.metadata.get("tokenizer.ggml.model")
    if model == "gpt2":
        tokenizer = _byte_level(gguf, tokens)
    elif model == "llama":
        tokenizer = _sentencepiece(gguf, tokens, kinds)
    else:
        raise UnsupportedModelError(
            f"{gguf.path.name} has a tokenizer of kind {model!r}; supported: gpt2, llama; give the safetensors folder"
        )
    spaced = model == "llama"
    tokenizer.add_special_tokens(
        [
            AddedToken(text, special=True, normalized=False)
            for text, kind in zip(tokens, kinds, strict=True)
            if kind == _CONTROL
        ]
    )
    # SentencePiece finds user-defined pieces in the normalized text, longest first, before BPE.
    tokenizer.add_tokens(
        [
            AddedToken(text.replace(" ", _SPACE) if spaced else text, special=False, normalized=spaced)
            for text, kind in zip(tokens, kinds, strict=True)
            if kind == _USER_DEFINED
        ]
    )
    _add_bos(gguf, tokenizer, tokens, default=spaced)
    return tokenizer


def make_tokenizer_config(gguf: GgufFile, context_length: int) -> dict[str, Any]:
    """tokenizer_config.json; a generic class, so that no code of a family changes what tokenizer.json says."""
    tokens, _ = _vocabulary(gguf)
    ids: dict[str, Any] = dict(special_token_ids(gguf))
    ids["unk_token_id"] = gguf.metadata.get("tokenizer.ggml.unknown_token_id")
    special = {
        key.removesuffix("_id"): tokens[index]
        for key, index in ids.items()
        if type(index) is int and 0 <= index < len(tokens)
    }
    return {
        **special,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": context_length,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }


def _vocabulary(gguf: GgufFile) -> tuple[list[str], list[int]]:
    """Tokens and their types, in order of id."""
    tokens = gguf.metadata.get("tokenizer.ggml.tokens")
    kinds = gguf.metadata.get("tokenizer.ggml.token_type")
    if not isinstance(tokens, list) or not isinstance(kinds, np.ndarray) or len(kinds) != len(tokens):
        raise InvalidInputError(
            f"{gguf.path.name} has no tokenizer.ggml.tokens with their token_type; it has no tokenizer"
        )
    return tokens, [int(kind) for kind in kinds]


def _byte_level(gguf: GgufFile, tokens: list[str]) -> Tokenizer:
    name = gguf.metadata.get("tokenizer.ggml.pre", "default")
    words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    splitters: dict[str, pre_tokenizers.PreTokenizer] = {
        "default": words,
        "gpt-2": words,
        "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), words]),
        "llama-bpe": pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(_LLAMA3_WORDS), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        ),
    }
    if name not in splitters:
        raise UnsupportedModelError(
            f"{gguf.path.name} splits text by the rules {name!r}; supported: {', '.join(splitters)}; "
            "give the safetensors folder"
        )
    lines = gguf.metadata.get("tokenizer.ggml.merges")
    merges = [tuple(line.split(" ")) for line in lines] if isinstance(lines, list) else []
    vocab = {token: index for index, token in enumerate(tokens)}
    if not merges or any(len(merge) != 2 for merge in merges):
        raise InvalidInputError(f"{gguf.path.name} has no usable tokenizer.ggml.merges")
    # Llama 3 looks a word up before it merges.
    bpe = _bpe(gguf, vocab=vocab, merges=merges, ignore_merges=name == "llama-bpe")
    tokenizer = Tokenizer(bpe)
    tokenizer.pre_tokenizer = splitters[name]
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(gguf: GgufFile, tokens: list[str], kinds: list[int]) -> Tokenizer:
    scores = gguf.metadata.get("tokenizer.ggml.scores")
    if not isinstance(scores, np.ndarray) or len(scores) != len(tokens):
        raise InvalidInputError(f"{gguf.path.name} has no tokenizer.ggml.scores for its {len(tokens)} tokens")
    # The converter wrote the runs of spaces among the user-defined pieces as plain spaces.
    pieces = [
        token.replace(" ", _SPACE) if kind == _USER_DEFINED else token
        for token, kind in zip(tokens, kinds, strict=True)
    ]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    if len(vocab) != len(pieces):
        raise InvalidInputError(f"{gguf.path.name} has {len(pieces) - len(vocab)} tokens twice in its vocabulary")
    ranked = {piece: float(score) for piece, kind, score in zip(pieces, kinds, scores, strict=True) if kind == _NORMAL}
    unknown = gguf.metadata.get("tokenizer.ggml.unknown_token_id", 0)
    bpe = _bpe(
        gguf,
        vocab=vocab,
        merges=merges_by_score(ranked),
        unk_token=pieces[unknown] if type(unknown) is int and unknown < len(pieces) else None,
        fuse_unk=True,
        byte_fallback=True,
    )
    tokenizer = Tokenizer(bpe)
    spaces = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if gguf.metadata.get("tokenizer.ggml.add_space_prefix", True):
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), normalizers.Replace(" ", _SPACE)])
        spaces.append(decoders.Strip(" ", 1, 0))
    else:
        tokenizer.normalizer = normalizers.Replace(" ", _SPACE)
    tokenizer.decoder = decoders.Sequence(spaces)
    return tokenizer


def merges_by_score(scores: dict[str, float]) -> list[tuple[str, str]]:
    """All splits of a piece into two pieces, best score of the whole first.

    Args:
        scores: the pieces that BPE may build or use.
    """
    merges = [
        (-score, piece[:cut], piece[cut:])
        for piece, score in scores.items()
        for cut in range(1, len(piece))
        if piece[:cut] in scores and piece[cut:] in scores
    ]
    # Of two splits of one piece only one can be present in a text at a time; the order only has to be fixed.
    merges.sort(key=lambda merge: (merge[0], len(merge[1]), merge[1]))
    return [(left, right) for _, left, right in merges]


def _bpe(gguf: GgufFile, **options: Any) -> models.BPE:
    try:
        return models.BPE(**options)
    except Exception as error:  # tokenizers raises plain Exception
        raise InvalidInputError(
            f"{gguf.path.name}: the vocabulary is inconsistent: {' '.join(str(error).split())}"
        ) from None


def _add_bos(gguf: GgufFile, tokenizer: Tokenizer, tokens: list[str], default: bool) -> None:
    bos = gguf.metadata.get("tokenizer.ggml.bos_token_id")
    wanted = gguf.metadata.get("tokenizer.ggml.add_bos_token", default)
    if not wanted or type(bos) is not int or bos >= len(tokens):
        return
    token = tokens[bos]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{token} $A", pair=f"{token} $A {token} $B:1", special_tokens=[(token, bos)]
    )
