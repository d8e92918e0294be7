"""Publishing a model: variants derived from released weights, and their ONNX files."""

from __future__ import annotations

import copy
import io
import tempfile
import time
import warnings
from dataclasses import dataclass
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

from fedvit.errors import ModelError
from fedvit.models.layers import LoraLinear, replace_modules
from fedvit.models.vision import VisionModel
from fedvit.types import FloatArray, ImageArray, Variant

INPUT_NAME = "images"
OUTPUT_NAME = "logits"
_OPSET = 18
# The first runs allocate; an edge has done them before its first request.
_WARM_UP_RUNS = 3
# Not Conv: as ConvInteger the stem took six times as long (3.9 ms against 0.6 ms a picture on one core).
_QUANTISED_OPERATORS = ["MatMul", "Gemm"]


@dataclass(frozen=True, slots=True)
class ExportCheck:
    """How far an exported network is from the torch model it should equal.

    ``agreement`` is the share of images that both put into the same class.
    """

    agreement: float
    max_abs_logit_difference: float


def make_variant(model: VisionModel, variant: Variant) -> VisionModel:
    """A frozen copy of ``model`` in the shape of ``variant``, adapters merged. Post-processing: costs no privacy.

    The two ``edge_optimized`` ones keep every other transformer block, at least one a stage (LayerDrop, Fan et al.
    2019, arXiv:1909.11556).
    """
    copied = copy.deepcopy(model).eval().requires_grad_(False)
    _merge_adapters(copied)
    if variant in (Variant.EDGE_OPTIMIZED, Variant.EDGE_OPTIMIZED_FP32):
        _drop_every_other_block(copied)
    return copied


def _merge_adapters(model: VisionModel) -> None:
    adapted = [(name, module) for name, module in model.named_modules() if isinstance(module, LoraLinear)]
    replace_modules(model, adapted, (module.merged() for _, module in adapted))


def _drop_every_other_block(model: VisionModel) -> None:
    for owner in model.blocks_owners():
        owner.blocks = cast("nn.Sequential | nn.ModuleList", owner.blocks)[::2]


def export_variant(model: VisionModel, variant: Variant, image_size: int) -> bytes:
    """The ONNX file of one variant; ``standard_int8`` and ``edge_optimized`` multiply in dynamic per-channel int8.

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
        # Folds the shape arithmetic that tracing leaves behind: 0.74 ms instead of 0.87 ms a picture.
        exported = optimizer.optimize(onnx.shape_inference.infer_shapes(onnx.load_from_string(buffer.getvalue())))
        onnx.checker.check_model(exported, full_check=True)
    except Exception as error:  # the exporter and the checker raise many kinds
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(f"The model cannot be written as ONNX: {reason}", cure="Choose another model.name.") from error
    content: bytes = exported.SerializeToString()
    return content


def _trace(model: VisionModel, example: torch.Tensor, buffer: io.BytesIO) -> None:
    """The tracing exporter, which torch calls legacy: torch.export's needs 8 s for what this does in 0.4 s."""
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
    # Says that the graph is clean, which the exporter saw to; without it the quantiser logs a warning twice.
    add_pre_process_metadata(model)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "quantised.onnx"
        quantize_dynamic(
            model,
            path,
            op_types_to_quantize=_QUANTISED_OPERATORS,
            per_channel=True,
            weight_type=QuantType.QInt8,
        )
        return path.read_bytes()


def check_export(onnx_bytes: bytes, model: VisionModel, images_u8: ImageArray) -> ExportCheck:
    """Run images [B, H, W, 3] through both and compare; ONNX Runtime on one thread.

    Args:
        model: what the file should equal: for a variant, :func:`make_variant` of the released model.
    """
    exported = run_onnx(onnx_bytes, images_u8)
    with torch.no_grad():
        expected = model.eval()(torch.from_numpy(images_u8)).numpy()
    agreement = np.mean(exported.argmax(axis=1) == expected.argmax(axis=1))
    return ExportCheck(float(agreement), float(np.abs(exported - expected).max()))


def run_onnx(onnx_bytes: bytes, images_u8: ImageArray) -> FloatArray:
    """Logits [B, classes] of an exported network for images [B, H, W, 3]; see :func:`time_onnx`."""
    return time_onnx(onnx_bytes, images_u8)[0]


def time_onnx(onnx_bytes: bytes, images_u8: ImageArray) -> tuple[FloatArray, npt.NDArray[np.float64]]:
    """Logits [B, classes] of an exported network for images [B, H, W, 3], and the milliseconds [B] of each image.

    ONNX Runtime on one thread, one picture at a time, as an edge sees them: int8 activations are scaled by the range
    of the whole batch, so that pictures run together influence each other.
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
