"""One block at a time is the whole model, for every family; observers see what linears read."""

from __future__ import annotations

import pytest
import torch

from bdq_export.calibration.blocks import BlockRunner
from bdq_export.calibration.loss import HeldOutLoss
from bdq_export.calibration.sites import block_sites
from bdq_export.calibration.statistics import InputObserver
from bdq_export.float_model import load_float_model

FAMILIES = ("llama", "llama3", "llama_biases", "mistral", "qwen2", "qwen3", "phi3", "gemma3")
TOKENS = torch.randint(3, 300, (5, 24), generator=torch.Generator().manual_seed(0))


def run_all(runner):
    hidden = runner.embedded()
    for layer in range(len(runner.blocks)):
        hidden = runner.run(layer, hidden)
    return torch.cat(list(runner.logits(hidden)))


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_in_turn_are_the_model(family, tiny_model, monkeypatch):
    monkeypatch.setattr("bdq_export.calibration.blocks._BATCH_TOKENS", 48)  # batches of 2, 2 and 1
    tiny = tiny_model(family)
    model = load_float_model(tiny, tiny.weights)
    runner = BlockRunner(model, tiny.architecture.layers, TOKENS, fast=False)
    with torch.no_grad():
        expected = model(TOKENS).logits
    torch.testing.assert_close(run_all(runner), expected, rtol=1e-4, atol=1e-4)
    with torch.no_grad():  # the recorders are gone
        assert torch.equal(model(TOKENS).logits, expected)


def test_a_batch_may_be_larger_than_all_there_is(tiny_model):
    tiny = tiny_model("gemma3")
    model = load_float_model(tiny, tiny.weights)
    all_of_them, one = (BlockRunner(model, tiny.architecture.layers, TOKENS[:n], fast=False) for n in (5, 1))
    hidden = all_of_them.embedded()
    with torch.no_grad():
        assert torch.equal(one.block(1, hidden), all_of_them.block(1, hidden))


@pytest.mark.parametrize("family", FAMILIES)
def test_sites_cover_all_linears_once(family, tiny_model):
    tiny = tiny_model(family)
    paths = [path for site in block_sites(tiny.architecture, tiny.dimensions, 1) for path in site.paths]
    assert sorted(paths) == sorted(tiny.architecture.layer_path(1, path) for path in tiny.architecture.linears)


@pytest.mark.parametrize("family", ["llama", "phi3", "gemma3"])
def test_statistics_are_those_of_the_inputs(family, tiny_model):
    tiny = tiny_model(family)
    model = load_float_model(tiny, tiny.weights)
    site = block_sites(tiny.architecture, tiny.dimensions, 0)[0]
    seen = []
    model.get_submodule(site.module).register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        model(TOKENS)
    rows = seen.pop().flatten(0, 1).double()
    runner = BlockRunner(model, tiny.architecture.layers, TOKENS, fast=False)
    for hessians in (False, True):
        observer = InputObserver(hessians)
        result = runner.run(0, runner.embedded(), observer, (site.module,), stop=True)
        assert not result.numel()
        found = observer.statistics(site.module)
        assert found.tokens == TOKENS.numel()
        torch.testing.assert_close(found.energy, rows.square().mean(0), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(found.absmax.double(), rows.abs().amax(0), rtol=1e-4, atol=1e-5)
        assert (found.low, found.high) == pytest.approx((rows.min().item(), rows.max().item()), rel=1e-4)
        assert (found.hessian is not None) is hessians
        if found.hessian is not None:
            expected = rows.T @ rows / len(rows)
            torch.testing.assert_close(found.hessian.diagonal().double(), expected.diagonal(), rtol=1e-3, atol=1e-5)
            share = (found.hessian.double() * expected).fill_diagonal_(0).sum() / expected.fill_diagonal_(
                0
            ).square().sum()
            assert 0 < share <= 1.001
            off_diagonal = found.hessian.double().fill_diagonal_(0)
            torch.testing.assert_close(off_diagonal, share * expected, rtol=1e-3, atol=1e-4)
    with pytest.raises(LookupError, match="no inputs"):
        observer.statistics("nowhere")


def test_the_held_out_loss_is_the_divergence_from_the_float_model(tiny_model):
    tiny = tiny_model("qwen2")
    model = load_float_model(tiny, tiny.weights)
    loss = HeldOutLoss(model, tiny.architecture.layers, TOKENS)
    assert loss() == pytest.approx(0, abs=1e-6)
    with torch.no_grad():
        target = model(TOKENS).logits.log_softmax(-1).flatten(0, 1)
        down = model.model.layers[1].mlp.down_proj
        down.weight = torch.nn.Parameter(down.weight * 1.5, requires_grad=False)
        actual = model(TOKENS).logits.log_softmax(-1).flatten(0, 1)
    expected = torch.nn.functional.kl_div(actual, target, log_target=True, reduction="batchmean").item()
    assert expected > 1e-4
    assert loss() == pytest.approx(expected, rel=1e-3)
