"""Tracing of a model by torch's ONNX exporter, with what the exporter lacks for timm's Vision Transformers."""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.onnx import symbolic_helper

from fedvit.atomic_write import write_atomically
from fedvit.errors import ModelError
from fedvit.models.vision import VisionModel

INPUT_NAME = "images"
OUTPUT_NAME = "logits"
_LOG = logging.getLogger(__name__)
_OPSET = 18
# The exporter keeps its state in globals of its module.
_EXPORTING = threading.Lock()


def trace(model: VisionModel, image_size: int) -> bytes:
    """The ONNX file as the exporter writes it; see :func:`fedvit.models.export.export_onnx`.

    Uses the legacy tracing exporter, which takes 0.4 s where that of torch.export takes 8 s. It prints a graph that it
    cannot express to the terminal; here it is logged.

    Raises:
        Exception: the exporter cannot express the model; it raises many kinds.
    """
    copied, buffer, batch = copy.deepcopy(model).eval(), io.BytesIO(), {0: "batch"}
    example = torch.zeros(2, image_size, image_size, 3, dtype=torch.uint8)
    with _EXPORTING, warnings.catch_warnings(), torch.no_grad(), _logged_graphs():
        warnings.simplefilter("ignore")
        _fix_rotary_positions(copied)
        register: Any = vars(torch.onnx)["register_custom_op_symbolic"]
        register("aten::rms_norm", _rms_norm, _OPSET)
        torch.onnx.export(
            copied,
            (example,),
            buffer,  # type: ignore[arg-type]  # the tracing exporter writes to files in memory as well
            dynamo=False,
            opset_version=_OPSET,
            input_names=[INPUT_NAME],
            output_names=[OUTPUT_NAME],
            dynamic_axes={INPUT_NAME: batch, OUTPUT_NAME: batch},
        )
    return buffer.getvalue()


class _FixedPositions(nn.Module):
    """Rotary embeddings as a constant, with the interface of timm's modules."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.register_buffer("table", table)
        self.feat_shape: tuple[int, ...] = ()

    def get_embed(self, shape: object = None) -> Any:
        """The embeddings of the model's one image size."""
        return self.table


def _fix_rotary_positions(model: nn.Module) -> None:
    """Compute learned rotary embeddings once: from their frequencies the exporter writes a graph that no batch fits."""
    for module in model.modules():
        if getattr(module, "rope_mixed", False):
            rope: Any = module.rope
            shape = None if rope.feat_shape is not None else module.patch_embed.grid_size  # type: ignore[union-attr]
            module.rope = _FixedPositions(rope.get_embed(shape=shape).detach())


def _rms_norm(graph: Any, x: Any, normalized_shape: Any, weight: Any, eps: Any) -> Any:
    """Root mean square norm (Zhang & Sennrich 2019, arXiv:1910.07467), an operator of ONNX since opset 23 only."""
    axes = list(range(-len(symbolic_helper._get_const(normalized_shape, "is", "normalized_shape")), 0))
    least = torch.finfo(torch.float32).eps if symbolic_helper._is_none(eps) else symbolic_helper._parse_arg(eps, "f")
    axes_value = graph.op("Constant", value_t=torch.tensor(axes))
    mean = graph.op("ReduceMean", graph.op("Mul", x, x), axes_value)
    root = graph.op("Sqrt", graph.op("Add", mean, graph.op("Constant", value_t=torch.tensor(least))))
    scaled = graph.op("Div", x, root)
    return scaled if symbolic_helper._is_none(weight) else graph.op("Mul", scaled, weight)


@contextlib.contextmanager
def graphs_logged_to(path: Path) -> Iterator[None]:
    """Write the graphs that the exporter cannot express to ``path``, and name the file in the error.

    Raises:
        ModelError: as raised in the block.
    """
    kept = _KeptRecords()
    _LOG.addHandler(kept)
    _LOG.setLevel(logging.INFO)
    try:
        yield
    except ModelError as error:
        if not kept.lines:
            raise
        write_atomically(path, "\n".join(kept.lines))
        raise ModelError(error.message, cure=f"{error.cure} The exporter's graph is in {path}.") from error
    finally:
        _LOG.removeHandler(kept)


class _KeptRecords(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


@contextlib.contextmanager
def _logged_graphs() -> Iterator[None]:
    """Log what the exporter would print to the process's standard output, thousands of lines."""
    bindings: Any = torch._C
    printing = bindings._jit_onnx_log

    def log(*parts: object) -> None:
        _LOG.info("%s", "".join(map(str, parts)))

    bindings._jit_onnx_log = log
    try:
        yield
    finally:
        bindings._jit_onnx_log = printing
