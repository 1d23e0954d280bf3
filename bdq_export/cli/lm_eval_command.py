"""`bdq lm-eval`."""

from __future__ import annotations

import typer

PASS_THROUGH = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
"""Every argument, `--help` too, is lm_eval's."""


def lm_eval_command(context: typer.Context) -> None:
    """lm-evaluation-harness, with exported models: run --model bdq --model_args pretrained=OUT --tasks NAMES"""
    from bdq_export.commands.lm_eval import run_lm_eval

    run_lm_eval(context.args)
