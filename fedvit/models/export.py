"""Model export: variants of released weights, their ONNX files, size and speed."""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

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
from fedvit.models.tracing import INPUT_NAME, OUTPUT_NAME, graphs_logged_to, trace
from fedvit.models.vision import VisionModel
from fedvit.types import FloatArray, ImageArray, Variant

_OTHER_MODEL = "Choose another model.name."
_QUANTISED = (Variant.STANDARD_INT8, Variant.EDGE_OPTIMIZED)
_CHECKED_BATCHES = (1, 3)
# Of the largest logit, at least of one: float32 in another order of operations.
_TOLERANCE = 1e-3
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
            if getattr(owner, "rope_mixed", False):
                # Every block has its own frequencies, [2, blocks, heads, width of a head / 2].
                frequencies: Any = owner.rope
                frequencies.freqs = nn.Parameter(frequencies.freqs[:, ::2], requires_grad=False)
    return copied


def export_variant(model: VisionModel, variant: Variant, image_size: int) -> bytes:
    """The ONNX file of one variant; ``standard_int8`` and ``edge_optimized`` use dynamic per-channel int8 products.

    Raises:
        ModelError: the exporter cannot express the model.
    """
    content = export_onnx(make_variant(model, variant), image_size)
    return _quantise(content) if variant in _QUANTISED else content


def export_onnx(model: VisionModel, image_size: int) -> bytes:
    """ONNX file: ``images`` uint8 [B, image_size, image_size, 3] to ``logits`` float32 [B, classes], B free.

    Raises:
        ModelError: the exporter cannot express the model.
    """
    try:
        traced = trace(model, image_size)
        # Folds the shape arithmetic of tracing: 0.74 ms instead of 0.87 ms per image.
        exported = optimizer.optimize(onnx.shape_inference.infer_shapes(onnx.load_from_string(traced)))
        onnx.checker.check_model(exported, full_check=True)
    except Exception as error:  # the exporter and the checker raise many kinds
        raise ModelError(f"The model cannot be written as ONNX: {_first_line(error)}", cure=_OTHER_MODEL) from error
    content: bytes = exported.SerializeToString()
    return content


def check_export(model: VisionModel, variants: Iterable[Variant], image_size: int, log: Path) -> None:
    """Export each variant, load it in ONNX Runtime, run it on batches of 1 and 3, and compare it with torch.

    With the count of operations, this is all that a release and a vehicle do with a model later. The trainable weights
    are changed at random first, in a copy, because a head that starts at zero would agree with anything.

    Args:
        log: written if the exporter cannot express the model: its graph.

    Raises:
        ModelError: a variant cannot be exported or run, has values that are not finite, or differs from torch.
    """
    copied = copy.deepcopy(model).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in copied.parameters():
            if parameter.requires_grad:
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    pixels = torch.randint(0, 256, (max(_CHECKED_BATCHES), image_size, image_size, 3), generator=generator)
    for variant in variants:
        exported = make_variant(copied, variant)
        complexity(exported)
        with graphs_logged_to(log):
            content = export_onnx(exported, image_size)
        _check_file(content, exported, variant, pixels.to(torch.uint8), compared=True)
        if variant in _QUANTISED:
            _check_file(_quantise(content), exported, variant, pixels.to(torch.uint8), compared=False)


def _check_file(content: bytes, model: VisionModel, variant: Variant, pixels: torch.Tensor, *, compared: bool) -> None:
    try:
        session = _open_session(content)
        for batch in _CHECKED_BATCHES:
            with torch.no_grad():
                expected = model(pixels[:batch]).numpy()
            logits = session.run([OUTPUT_NAME], {INPUT_NAME: pixels[:batch].numpy()})[0]
            _check_logits(logits, expected, compared=compared)
    except Exception as error:  # ONNX Runtime has no error type of its own
        message = f"The variant {variant.value!r} of the model cannot be used in ONNX Runtime: {_first_line(error)}"
        raise ModelError(message, cure=_OTHER_MODEL) from error


def _check_logits(logits: FloatArray, expected: FloatArray, *, compared: bool) -> None:
    if logits.shape != expected.shape:
        raise ValueError(f"it answers {list(expected.shape[:1])} images with logits of shape {list(logits.shape)}.")
    if not (np.isfinite(logits).all() and np.isfinite(expected).all()):
        raise ValueError("its logits are not finite.")
    difference, largest = float(np.abs(logits - expected).max()), float(np.abs(expected).max())
    if compared and difference > _TOLERANCE * max(1.0, largest):
        raise ValueError(f"its logits differ from torch by {difference:.2g}, and the largest is {largest:.2g}.")


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


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
    # Without gradients, torch's counter fails on a view of a trainable parameter: the query of attention pooling.
    with torch.enable_grad(), FlopCounterMode(display=False) as counter:
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
    session = _open_session(onnx_bytes)
    for _ in range(_WARM_UP_RUNS):
        session.run([OUTPUT_NAME], {INPUT_NAME: images_u8[:1]})
    logits, moments_s = [], [time.perf_counter()]
    for single in np.split(images_u8, len(images_u8)):
        logits.append(session.run([OUTPUT_NAME], {INPUT_NAME: single})[0])
        moments_s.append(time.perf_counter())
    return np.concatenate(logits), np.diff(moments_s) * 1000


def _open_session(content: bytes) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    # Errors are raised as well.
    options.log_severity_level = 4
    # Without VNNI, AVX2 adds int8 products in 16 bits and saturates silently.
    options.add_session_config_entry("session.x64quantprecision", "1")
    return ort.InferenceSession(content, options, providers=["CPUExecutionProvider"])
