"""Whether ONNX Runtime multiplies 8-bit integers exactly on this processor."""

from __future__ import annotations

import numpy as np

_COLUMNS = 64


def saturates() -> bool:
    """Whether sums of uint8 x int8 products are not exact here, asked of ONNX Runtime itself.

    On x86 without VNNI its kernels add two products in 16 bits, which hold 32767 at most: 255 * 127 twice is more.
    Static w8a8 (QDQ and QLinearMatMul) has such products; the `bdq` operators and their functions have none that do not
    fit.
    """
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    weight = numpy_helper.from_array(np.full((_COLUMNS, 16), 127, np.int8), "weight")
    graph = helper.make_graph(
        [helper.make_node("MatMulInteger", ["x", "weight"], ["y"])],
        "products",
        [helper.make_tensor_value_info("x", TensorProto.UINT8, [1, _COLUMNS])],
        [helper.make_tensor_value_info("y", TensorProto.INT32, [1, 16])],
        [weight],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"x": np.full((1, _COLUMNS), 255, np.uint8)})
    return bool((found != 255 * 127 * _COLUMNS).any())
