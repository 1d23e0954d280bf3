"""A tiny random decoder as an ONNX file with a byte-level tokenizer beside it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

VOCAB, HIDDEN, HEADS, KV_HEADS, HEAD_DIM, LAYERS, MAX_LENGTH = 264, 64, 4, 2, 16, 2, 256
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}>{% endif %}"


class DecoderBuilder:
    """Writes one graph, node by node.

    Args:
        attention: "gqa" (GroupQueryAttention) or "concat" (plain operators, the cache is concatenated); equal
            functions of the tokens when `rotary` is off.
        keep: give the graph the optional input `logits_to_keep`.
        positions: give it the input `position_ids`, added to the token ids' embedding.
        batch: how many rows it declares to take, 1 or a name.
    """

    def __init__(
        self, attention: str, rotary: bool, keep: bool, positions: bool, window: int, batch: int | str
    ) -> None:
        self.attention, self.rotary, self.keep, self.positions, self.window = attention, rotary, keep, positions, window
        self.batch = batch
        self.nodes: list[Any] = []
        self.weights: list[Any] = []
        self.random = np.random.default_rng(7)

    def weight(self, name: str, *shape: int, scale: float | None = None) -> str:
        """A random float initializer."""
        values = self.random.standard_normal(shape) * (scale if scale is not None else shape[0] ** -0.5)
        return self.constant(name, values.astype(np.float32))

    def constant(self, name: str, values: Any) -> str:
        """An initializer; a name given twice is written once."""
        if all(w.name != name for w in self.weights):
            self.weights.append(numpy_helper.from_array(np.asarray(values), name))
        return name

    def ints(self, *values: int) -> str:
        """An int64 vector."""
        return self.constant("ints_" + "_".join(map(str, values)), np.array(values, np.int64))

    def add(self, op: str, *inputs: str, outputs: tuple[str, ...] | None = None, **attributes: Any) -> str:
        """A node; its first output."""
        names = outputs or (f"node{len(self.nodes)}",)
        domain = attributes.pop("domain", "")
        self.nodes.append(helper.make_node(op, list(inputs), list(names), domain=domain, **attributes))
        return names[0]

    def norm(self, x: str, name: str) -> str:
        """RMS normalization with a random gain."""
        gain = self.constant(name, np.exp(self.random.standard_normal(HIDDEN) * 0.2).astype(np.float32))
        return self.add("RMSNormalization", x, gain, axis=-1, epsilon=1e-5)

    def layer(self, x: str, i: int) -> str:
        """One decoder layer."""
        h = self.norm(x, f"norm{i}")
        kv = KV_HEADS * HEAD_DIM
        # Large q and k: attention that is nearly uniform would hide a wrong mask.
        q = self.add("MatMul", h, self.weight(f"q{i}", HIDDEN, HEADS * HEAD_DIM, scale=0.4))
        k = self.add("MatMul", h, self.weight(f"k{i}", HIDDEN, kv, scale=0.4))
        v = self.add("MatMul", h, self.weight(f"v{i}", HIDDEN, kv))
        attended = self.gqa(q, k, v, i) if self.attention == "gqa" else self.plain(q, k, v, i)
        x = self.add("Add", x, self.add("MatMul", attended, self.weight(f"o{i}", HEADS * HEAD_DIM, HIDDEN)))
        h = self.norm(x, f"post{i}")
        up = self.add("MatMul", h, self.weight(f"up{i}", HIDDEN, 96))
        gated = self.add("Mul", up, self.add("Sigmoid", up))
        return self.add("Add", x, self.add("MatMul", gated, self.weight(f"down{i}", 96, HIDDEN)))

    def gqa(self, q: str, k: str, v: str, i: int) -> str:
        """The fused operator, which takes the length of the text from the mask."""
        angles = np.outer(np.arange(MAX_LENGTH), 100.0 ** -(np.arange(HEAD_DIM // 2) / (HEAD_DIM // 2)))
        tables = ("", "")
        if self.rotary:
            tables = (
                self.constant("cos", np.cos(angles).astype(np.float32)),
                self.constant("sin", np.sin(angles).astype(np.float32)),
            )
        past = (f"past_key_values.{i}.key", f"past_key_values.{i}.value")
        present = (f"a{i}", f"present.{i}.key", f"present.{i}.value")
        return self.add(
            "GroupQueryAttention",
            *(q, k, v, *past, "seqlens", "total", *tables),
            outputs=present,
            domain="com.microsoft",
            num_heads=HEADS,
            kv_num_heads=KV_HEADS,
            do_rotary=int(self.rotary),
            local_window_size=self.window,
        )

    def plain(self, q: str, k: str, v: str, i: int) -> str:
        """The same attention from basic operators."""

        def heads(x: str, count: int) -> str:
            return self.add("Transpose", self.add("Reshape", x, self.ints(0, -1, count, HEAD_DIM)), perm=[0, 2, 1, 3])

        keys, values = (
            self.add("Concat", f"past_key_values.{i}.{n}", heads(x, KV_HEADS), outputs=(f"present.{i}.{n}",), axis=2)
            for n, x in (("key", k), ("value", v))
        )
        repeated = [self.add("Gather", x, self.ints(0, 0, 1, 1), axis=1) for x in (keys, values)]
        scores = self.add("MatMul", heads(q, HEADS), self.add("Transpose", repeated[0], perm=[0, 1, 3, 2]))
        scores = self.add("Mul", scores, self.constant("scale", np.float32(HEAD_DIM**-0.5)))
        attended = self.add("MatMul", self.add("Softmax", self.add("Add", scores, "bias"), axis=-1), repeated[1])
        return self.add("Reshape", self.add("Transpose", attended, perm=[0, 2, 1, 3]), self.ints(0, -1, HIDDEN))

    def lengths(self) -> None:
        """Lengths of the text for the fused operator, or the causal mask for the plain one."""
        if self.attention == "gqa":
            count = self.add("ReduceSum", "attention_mask", self.ints(1), keepdims=0)
            self.add("Cast", self.add("Sub", count, self.ints(1)), outputs=("seqlens",), to=TensorProto.INT32)
            self.add("Cast", self.dimension("attention_mask"), outputs=("total",), to=TensorProto.INT32)
            return
        zero, one = (self.constant(f"scalar{n}", np.int64(n)) for n in (0, 1))
        total, count = self.dimension("attention_mask"), self.dimension("input_ids")
        columns = self.add("Range", zero, total, one)
        rows = self.add("Range", self.add("Sub", total, count), total, one)
        future = self.add("Less", self.add("Unsqueeze", rows, self.ints(1)), columns)
        minus, none = (self.constant(f"float{n}", np.float32(n)) for n in (-1e30, 0.0))
        self.add("Where", future, minus, none, outputs=("bias",))

    def dimension(self, name: str) -> str:
        """The second dimension of `name`, a scalar."""
        return self.add("Gather", self.add("Shape", name), self.constant("second", np.int64(1)))

    def build(self) -> onnx.ModelProto:
        """The model."""
        self.lengths()
        x = self.add("Gather", self.weight("embedding", VOCAB, HIDDEN, scale=1.0), "input_ids")
        if self.positions:
            x = self.add(
                "Add", x, self.add("Gather", self.weight("places", MAX_LENGTH, HIDDEN, scale=1.0), "position_ids")
            )
        for i in range(LAYERS):
            x = self.layer(x, i)
        if self.keep:
            self.constant("logits_to_keep", np.int64(1))
            start = self.add("Unsqueeze", self.add("Neg", "logits_to_keep"), self.ints(0))
            x = self.add("Slice", x, start, self.ints(np.iinfo(np.int64).max), self.ints(1))
        self.add("MatMul", self.norm(x, "norm"), self.weight("lm_head", HIDDEN, VOCAB, scale=0.4), outputs=("logits",))
        graph = helper.make_graph(self.nodes, "tiny", list(self.inputs()), list(self.outputs()), self.weights)
        opsets = [helper.make_opsetid("", 23), helper.make_opsetid("com.microsoft", 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=10)

    def inputs(self) -> Iterator[Any]:
        """Declared inputs; `logits_to_keep` has an initializer too, which makes it optional."""
        yield helper.make_tensor_value_info("input_ids", TensorProto.INT64, [self.batch, "sequence"])
        yield helper.make_tensor_value_info("attention_mask", TensorProto.INT64, [self.batch, "total"])
        if self.positions:
            yield helper.make_tensor_value_info("position_ids", TensorProto.INT64, [self.batch, "sequence"])
        for i in range(LAYERS):
            for name in ("key", "value"):
                shape = [self.batch, KV_HEADS, "past", HEAD_DIM]
                yield helper.make_tensor_value_info(f"past_key_values.{i}.{name}", TensorProto.FLOAT, shape)
        if self.keep:
            yield helper.make_tensor_value_info("logits_to_keep", TensorProto.INT64, [])

    def outputs(self) -> Iterator[Any]:
        """Keys before values, as onnxruntime-genai orders them: the loop must go by name."""
        # one row by default, as keep-last-logits declares it: onnxruntime-genai reads that length
        rows = 1 if self.keep else "rows"
        yield helper.make_tensor_value_info("logits", TensorProto.FLOAT, [self.batch, rows, VOCAB])
        for name in ("key", "value"):
            for i in range(LAYERS):
                shape = [self.batch, KV_HEADS, "present", HEAD_DIM]
                yield helper.make_tensor_value_info(f"present.{i}.{name}", TensorProto.FLOAT, shape)


def write_tokenizer(folder: Path, begin: bool = False) -> None:
    """A byte-level tokenizer: ids 0 to 255 are bytes, 256 and 257 merges, 258 `<end>`, 259 `<begin>`."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {symbol: i for i, symbol in enumerate([*alphabet, "th", "Ġt"])}
    tokenizer = Tokenizer(models.BPE(vocab, [("t", "h"), ("Ġ", "t")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<end>", special=True), AddedToken("<begin>", special=True)])
    if begin:
        tokenizer.post_processor = processors.TemplateProcessing(
            "<begin> $A <end>", None, [("<begin>", 259), ("<end>", 258)]
        )
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": "<end>", "bos_token": {"content": "<begin>"}})
    )
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [258]}))
    (folder / "config.json").write_text(json.dumps({"max_position_embeddings": MAX_LENGTH}))


@pytest.fixture(scope="session")
def tiny_decoder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Write a tiny decoder: `tiny_decoder(attention="gqa", rotary=True, keep=True, positions=False, window=-1)`.

    `batch` is how many rows it declares, 1 or a name; only plain attention takes several after a past.

    Returns the folder, which holds model.onnx, model.onnx.data and tokenizer files; do not change it.
    """
    made: dict[tuple[Any, ...], Path] = {}

    def make(
        attention: str = "gqa",
        rotary: bool = True,
        keep: bool = True,
        positions: bool = False,
        window: int = -1,
        begin: bool = False,
        batch: int | str = 1,
    ) -> Path:
        key = (attention, rotary, keep, positions, window, begin, batch)
        if key not in made:
            folder = tmp_path_factory.mktemp("decoder")
            model = DecoderBuilder(attention, rotary, keep, positions, window, batch).build()
            onnx.save(model, folder / "model.onnx", save_as_external_data=True, location="model.onnx.data")
            write_tokenizer(folder, begin)
            made[key] = folder
        return made[key]

    return make
