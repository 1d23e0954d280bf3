"""What of the options a model has room for."""

from __future__ import annotations

import pytest

from bdq_export.errors import UsageError
from bdq_export.options import ExportOptions
from bdq_export.quantize.specs import with_sequence_length
from bdq_models import Dimensions


def of_context(make_tiny_config, context: int) -> Dimensions:
    return Dimensions.from_config(make_tiny_config("llama", max_position_embeddings=context))


@pytest.mark.parametrize(
    ("asked", "context", "length"), [(None, 8192, 512), (None, 256, 256), (64, 256, 64), (256, 256, 256)]
)
def test_calibration_sequences_fit_the_context(asked, context, length, make_tiny_config):
    options = ExportOptions(calib_seq_len=asked)
    assert with_sequence_length(options, of_context(make_tiny_config, context)).seq_len == length


def test_where_nothing_is_cut_no_length_is_given(make_tiny_config):
    options = ExportOptions(transform="none", weights="rtn")
    assert with_sequence_length(options, of_context(make_tiny_config, 256)) == options


def test_longer_ones_are_refused(make_tiny_config):
    with pytest.raises(UsageError, match="--calib-seq-len is 257, the model's context is 256; ask for less"):
        with_sequence_length(ExportOptions(calib_seq_len=257), of_context(make_tiny_config, 256))
