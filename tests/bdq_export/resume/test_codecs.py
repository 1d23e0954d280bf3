"""Transforms come back from a record as they were."""

from __future__ import annotations

import numpy as np
import torch

from bdq_export.resume.codecs import transforms_from, transforms_record
from bdq_export.transform import Transforms
from bdq_runtime.specs import OnlineTransform


def test_online_transforms_come_back():
    diagonal = np.linspace(0.5, 2, 48, dtype=np.float32)
    given = {(0, "value"): OnlineTransform(16, diagonal, interleave=3), (1, "mlp_middle"): OnlineTransform(32)}
    found = transforms_from(transforms_record(Transforms(head_rotations={0: torch.eye(4)}, online=given)))
    assert found.online.keys() == given.keys()
    for key, transform in given.items():
        got = found.online[key]
        assert (got.hadamard_size, got.interleave) == (transform.hadamard_size, transform.interleave)
        assert np.array_equal(got.diagonal, transform.diagonal)
