"""`bdq lm-eval`: the command of lm-evaluation-harness, which then knows the model `bdq`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.util import find_spec

from bdq_export.commands.runtime_errors import invalid_input
from bdq_export.errors import MissingDependencyError


def run_lm_eval(arguments: Sequence[str]) -> None:
    """Run lm_eval's own command line.

    Args:
        arguments: all that follows `lm_eval`; `--model bdq --model_args pretrained=FOLDER` is an exported model.

    Raises:
        MissingDependencyError: lm_eval is not installed.
        InvalidInputError: what lm_eval or the model says of a wrong task, folder or argument.
    """
    if find_spec("lm_eval") is None:
        raise MissingDependencyError(
            'bdq lm-eval needs the package lm_eval; install it with: pip install "bdq-export[lm-eval]"'
        )
    from lm_eval.__main__ import cli_evaluate

    import bdq_export.lm_eval_adapter  # noqa: F401 (registers the model)

    sys.argv = ["bdq lm-eval", *arguments]
    with invalid_input():
        cli_evaluate()
