"""Model export: variants of released weights, their ONNX files, size and speed."""

from __future__ import annotations

import copy
import io
import tempfile
import time
import warnings
from pathlib import Path
from typing import cast

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
import torch
from onnxruntime.quantization import QuantType, quantize_dynamic
from onnxruntime.quantization.quant_utils import add_pre_process_metadata
from onnxscript import optimizer
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fedvit.errors import ModelError
from fedvit.models.layers import LoraLinear, replace_modules
from fedvit.models.vision import VisionModel
from fedvit.types import FloatArray, ImageArray, Variant

INPUT_NAME = "images"
OUTPUT_NAME = "logits"
_OPSET = 18
# The first runs allocate memory; an edge process does them before its first request.
_WARM_UP_RUNS = 3
# Not Conv: as ConvInteger the stem took six times as long (3.9 ms against 0.6 ms a picture on one core).
_QUANTISED_OPERATORS = ["MatMul", "Gemm"]


def make_variant(model: VisionModel, variant: Variant) -> VisionModel:
    """A frozen copy of ``model`` as ``variant``, with adapters merged. It is post-processing and costs no privacy.

    The two ``edge_optimized`` variants keep every other transformer block, at least one per stage (LayerDrop, Fan et
    al. 2019, arXiv:1909.11556).
    """
    copied = copy.deepcopy(model).eval().requires_grad_(False)
    adapted = [(name, module) for name, module in copied.named_modules() if isinstance(module, LoraLinear)]
    replace_modules(copied, adapted, (module.merged() for _, module in adapted))
    if variant in (Variant.EDGE_OPTIMIZED, Variant.EDGE_OPTIMIZED_FP32):
        for owner in copied.blocks_owners():
            owner.blocks = cast("nn.Sequential | nn.ModuleList", owner.blocks)[::2]
    return copied


def export_variant(model: VisionModel, variant: Variant, image_size: int) -> bytes:
    """The ONNX file of one variant; ``standard_int8`` and ``edge_optimized`` use dynamic per-channel int8 products.

    Raises:
        ModelError: the exporter cannot express the model.
    """
    content = export_onnx(make_variant(model, variant), image_size)
    return _quantise(content) if variant in (Variant.STANDARD_INT8, Variant.EDGE_OPTIMIZED) else content


def export_onnx(model: VisionModel, image_size: int) -> bytes:
    """ONNX file: ``images`` uint8 [B, image_size, image_size, 3] to ``logits`` float32 [B, classes], B free.

    Raises:
        ModelError: the exporter cannot express the model.
    """
    example = torch.zeros(2, image_size, image_size, 3, dtype=torch.uint8)
    buffer = io.BytesIO()
    try:
        _trace(model, example, buffer)
        # Folds the shape arithmetic of tracing: 0.74 ms instead of 0.87 ms per image.
        exported = optimizer.optimize(onnx.shape_inference.infer_shapes(onnx.load_from_string(buffer.getvalue())))
        onnx.checker.check_model(exported, full_check=True)
    except Exception as error:  # the exporter and the checker raise many kinds
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(f"The model cannot be written as ONNX: {reason}", cure="Choose another model.name.") from error
    content: bytes = exported.SerializeToString()
    return content


def _trace(model: VisionModel, example: torch.Tensor, buffer: io.BytesIO) -> None:
    """Uses the legacy tracing exporter, which takes 0.4 s where that of torch.export takes 8 s."""
    batch = {0: "batch"}
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            copy.deepcopy(model).eval(),
            (example,),
            buffer,  # type: ignore[arg-type]  # the tracing exporter writes to files in memory as well
            dynamo=False,
            opset_version=_OPSET,
            input_names=[INPUT_NAME],
            output_names=[OUTPUT_NAME],
            dynamic_axes={INPUT_NAME: batch, OUTPUT_NAME: batch},
        )


def _quantise(content: bytes) -> bytes:
    model = onnx.load_from_string(content)
    # Marks the graph as preprocessed, as the exporter leaves it; otherwise the quantiser warns twice.
    add_pre_process_metadata(model)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "quantised.onnx"
        quantize_dynamic(
            model, path, op_types_to_quantize=_QUANTISED_OPERATORS, per_channel=True, weight_type=QuantType.QInt8
        )
        return path.read_bytes()


def complexity(model: VisionModel) -> dict[str, float]:
    """``parameters``, transformer ``blocks``, and ``multiply_adds`` of one image (matrix products, convolutions)."""
    image = torch.zeros(1, model.image_size, model.image_size, 3, dtype=torch.uint8)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(image)
    return {
        "parameters": float(sum(parameter.numel() for parameter in model.parameters())),
        "blocks": float(sum(len(cast("nn.Sequential", owner.blocks)) for owner in model.blocks_owners())),
        "multiply_adds": counter.get_total_flops() / 2,
    }


def time_onnx(onnx_bytes: bytes, images_u8: ImageArray) -> tuple[FloatArray, npt.NDArray[np.float64]]:
    """Logits [B, classes] of an exported network for images [B, H, W, 3], and the milliseconds [B] of each image.

    ONNX Runtime on one thread, one image at a time as on an edge device: int8 activations are scaled by the range of
    the whole batch, so images in one batch would influence each other.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    # Without VNNI, AVX2 adds int8 products in 16 bits and saturates silently.
    options.add_session_config_entry("session.x64quantprecision", "1")
    session = ort.InferenceSession(onnx_bytes, options, providers=["CPUExecutionProvider"])
    for _ in range(_WARM_UP_RUNS):
        session.run([OUTPUT_NAME], {INPUT_NAME: images_u8[:1]})
    logits, moments_s = [], [time.perf_counter()]
    for single in np.split(images_u8, len(images_u8)):
        logits.append(session.run([OUTPUT_NAME], {INPUT_NAME: single})[0])
        moments_s.append(time.perf_counter())
    return np.concatenate(logits), np.diff(moments_s) * 1000
