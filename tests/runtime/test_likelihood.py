"""Log-likelihoods: however runs are shared, each is that of one full run; and how many tokens that takes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bdq_runtime import likelihood
from bdq_runtime.branches import accepts_branches
from bdq_runtime.likelihood import LogLikelihood, score_pairs
from bdq_runtime.model import LanguageModel
from bdq_runtime.prefix_reuse import PrefixReuse
from bdq_runtime.scoring import log_likelihood

Pairs = list[tuple[list[int], list[int]]]


PLAIN: dict[str, Any] = {"attention": "concat", "rotary": False}
BRANCHES: dict[str, Any] = {**PLAIN, "batch": "batch", "positions": True}
VARIANTS: dict[str, dict[str, Any]] = {
    "gqa": {},
    "all logits": {"keep": False},
    "plain": PLAIN,
    "branches": BRANCHES,
    "branches, all logits": {**BRANCHES, "keep": False},
}


@pytest.fixture(scope="module", params=VARIANTS)
def model(request: pytest.FixtureRequest, tiny_decoder: Callable[..., Path]) -> LanguageModel:
    return LanguageModel(tiny_decoder(**VARIANTS[request.param]), threads=1)


@pytest.fixture
def fed(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Tokens of each run."""
    runs: list[int] = []
    append = LanguageModel.append

    def counting(self: LanguageModel, tokens: Sequence[int], *args: Any, **kwargs: Any) -> Any:
        runs.append(len(tokens))
        return append(self, tokens, *args, **kwargs)

    monkeypatch.setattr(LanguageModel, "append", counting)
    monkeypatch.setattr(likelihood, "accepts_branches", lambda model: False)
    return runs


def by_hand(model: LanguageModel, before: list[int], after: list[int]) -> LogLikelihood:
    """One full run over everything, then log-softmax at the positions that predict the continuation."""
    model.reset()
    logits = model.append(before + after[:-1], all_logits=True)[len(before) - 1 :].astype(np.float64)
    log_probabilities = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    total = sum(log_probabilities[i, token] for i, token in enumerate(after))
    return LogLikelihood(float(total), logits.argmax(-1).tolist() == after)


def assert_equal_to_full_runs(model: LanguageModel, pairs: Pairs) -> None:
    found = dict(score_pairs(model, pairs))
    assert sorted(found) == list(range(len(pairs)))
    for index, (before, after) in enumerate(pairs):
        expected = by_hand(model, before, after)
        assert found[index].total == pytest.approx(expected.total, abs=1e-3)
        assert found[index].greedy == expected.greedy


# Few different tokens: sequences that are prefixes of others, equal ones and borders at other places all happen.
tokens = st.lists(st.integers(0, 2), min_size=1, max_size=6)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(tokens, tokens), min_size=1, max_size=8))
def test_shared_runs_equal_full_runs(model: LanguageModel, pairs: Pairs) -> None:
    assert_equal_to_full_runs(model, pairs)


def test_greedy_continuations_are_seen(model: LanguageModel) -> None:
    before, after = [5, 6, 7], []
    for _ in range(3):
        model.reset()
        after.append(int(model.append(before + after)[-1].argmax()))
    wrong = [*after[:-1], (after[-1] + 1) % 264]
    found = dict(score_pairs(model, [(before, after), (before, wrong), (before, after[:1])]))
    assert [found[i].greedy for i in range(3)] == [True, False, True]


def test_a_context_is_read_once(tiny_decoder: Callable[..., Path], fed: list[int]) -> None:
    model = LanguageModel(tiny_decoder(), threads=1)
    context = list(range(40))
    # Sequences end before the last token: 40 + 2, then 2 and 1 more, one that is a prefix, one that is known.
    pairs = [(context, after) for after in ([9, 8, 7], [6, 5, 4], [3, 2], [1], [9, 8, 200])]
    assert len(dict(score_pairs(model, pairs))) == 5
    assert sorted(fed, reverse=True) == [42, 2, 1]
    fed.clear()
    other = [([*context[:30], 100 + i], [5, 6]) for i in range(3)]
    assert len(dict(score_pairs(model, other))) == 3
    assert sorted(fed, reverse=True) == [32, 2, 2], "the first 30 tokens are shared by different contexts"


def test_long_contexts_lose_their_start(model: LanguageModel) -> None:
    before = np.random.default_rng(0).integers(0, 256, 400).tolist()
    for after in ([1], [1, 2], list(range(256))):
        # 256 positions are read: all of the text but its last token.
        ((_, found),) = score_pairs(model, [(before, after)])
        assert found.total == pytest.approx(by_hand(model, before[-(256 + 1 - len(after)) :], after).total, abs=1e-2)
    ((_, found),) = score_pairs(model, [(before, [1, 2])], context_length=10)
    assert found.total == pytest.approx(by_hand(model, before[-9:], [1, 2]).total, abs=1e-3)
    with pytest.raises(ValueError, match="257 tokens and the model's context 256"):
        list(score_pairs(model, [(before, [1] * 257)]))
    with pytest.raises(ValueError, match="0 context and 1 continuation"):
        list(score_pairs(model, [([], [1])]))


def test_pieces_of_logits_equal_the_whole(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    sequence = np.random.default_rng(1).integers(0, 256, 60).tolist()
    whole = np.concatenate(list(PrefixReuse(model).read(sequence, 7)))
    monkeypatch.setattr("bdq_runtime.prefix_reuse.LOGITS_BYTES", 4 * 264 * 10)
    reuse = PrefixReuse(model)
    for start in (7, 30, 7, 59):  # rows that are held, and rows that were not and are computed again
        pieces = [piece.copy() for piece in reuse.read(sequence, start)]
        assert max(map(len, pieces)) <= 10
        np.testing.assert_allclose(np.concatenate(pieces), whole[start - 7 :], atol=2e-4)
    np.testing.assert_allclose(np.concatenate(list(reuse.read(sequence[:50], 45))), whole[38:43], atol=2e-4)


def test_log_likelihood_equals_float64() -> None:
    random = np.random.default_rng(2)
    logits = (random.standard_normal((9, 5000)) * 8 + 100).astype(np.float32)
    targets = random.integers(0, 5000, 9)
    targets[:4] = logits.argmax(-1)[:4]
    wide = logits.astype(np.float64)
    expected = (wide[np.arange(9), targets] - np.log(np.exp(wide).sum(-1))).sum()
    assert log_likelihood(logits, targets)[0] == pytest.approx(expected, abs=1e-6)
    assert log_likelihood(logits, targets)[1] is False
    assert log_likelihood(logits[:4], targets[:4])[1] is True


@pytest.mark.parametrize("variant", VARIANTS)
def test_which_graphs_take_branches(tiny_decoder: Callable[..., Path], variant: str) -> None:
    model = LanguageModel(tiny_decoder(**VARIANTS[variant]), threads=1)
    assert accepts_branches(model) == variant.startswith("branches")
    assert model.branches == variant.startswith("branches")


def test_a_graph_that_mixes_branches_up_is_not_used(
    tiny_decoder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = LanguageModel(tiny_decoder(**BRANCHES), threads=1)
    branch = LanguageModel.branch
    monkeypatch.setattr(LanguageModel, "branch", lambda self, rows: branch(self, rows)[::-1])
    assert not accepts_branches(model)


def test_choices_are_one_run(tiny_decoder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    model = LanguageModel(tiny_decoder(**BRANCHES), threads=1)
    runs: list[tuple[int, ...]] = []
    branch = LanguageModel.branch

    def counting(self: LanguageModel, rows: Any) -> Any:
        runs.append(rows.shape)
        return branch(self, rows)

    random = np.random.default_rng(5)
    context = random.integers(0, 256, 100).tolist()
    choices = [random.integers(0, 256, n).tolist() for n in (3, 4, 6, 2)]
    pairs = [(context, choice) for choice in [*choices, choices[0][:2], [7]]]
    expected = [by_hand(model, *pair) for pair in pairs]
    assert accepts_branches(model)
    monkeypatch.setattr(LanguageModel, "branch", counting)
    found = dict(score_pairs(model, pairs))
    # The last token of the context and all of a choice but its last; a prefix of another has no row.
    assert runs == [(4, 6)]
    for index, score in enumerate(expected):
        assert found[index].total == pytest.approx(score.total, abs=1e-3)
    runs.clear()
    monkeypatch.setattr(likelihood, "LOGITS_BYTES", 4 * 264 * 13)
    assert len(dict(score_pairs(model, pairs))) == 6
    assert all(rows * count <= 13 for rows, count in runs), "no more logits than fit"
