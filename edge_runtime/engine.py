"""Inference of one model version with ONNX Runtime."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from fedvit.errors import InferenceError, IntegrityError
from fedvit.types import ImageArray
from fedvit.wire.images import decode_image
from fedvit.wire.manifest import ReleaseManifest

INPUT_NAME = "images"
OUTPUT_NAME = "logits"
_ERRORS_ONLY = 3
_ONE_PIXEL = b"P6 1 1 255\n\0\0\0"


@dataclass(frozen=True, slots=True)
class Prediction:
    """One model version's prediction for one image; ``probabilities`` by class name, in the model's order."""

    class_index: int
    label: str
    confidence: float
    probabilities: dict[str, float]
    model_version: str
    variant: str
    duration_s: float


class InferenceEngine:
    """A loaded, warmed-up model. Safe to call from several threads.

    Args:
        model: the ONNX file, or its bytes: ``images`` uint8 [B, S, S, 3] to ``logits`` float32 [B, C].
        manifest: the model's release, which S and C must match.
        threads: the number of threads for one image.

    Raises:
        IntegrityError: the model cannot be loaded, or does not match the manifest.
    """

    def __init__(self, model: Path | bytes, manifest: ReleaseManifest, threads: int = 1) -> None:
        self.manifest = manifest
        self._session = _open_session(model, manifest, threads)
        _check_interface(self._session, manifest)
        # Run once, so that the first image is not slow and a broken model is refused.
        try:
            self._run(decode_image(_ONE_PIXEL, manifest.image_size))
        except InferenceError as error:
            raise IntegrityError(f"{error.message} It was its first run.", cure=error.cure) from None

    def infer(self, image_bytes: bytes) -> Prediction:
        """Classify one encoded image; ``duration_s`` covers decoding and the model.

        Raises:
            DataError: the image cannot be decoded.
            InferenceError: the model's output is not finite.
        """
        started = time.perf_counter()
        manifest = self.manifest
        logits = self._run(decode_image(image_bytes, manifest.image_size))
        exponentials = np.exp(logits - logits.max())
        probabilities = exponentials / exponentials.sum()
        best = int(probabilities.argmax())
        return Prediction(
            class_index=best,
            label=manifest.classes[best],
            confidence=float(probabilities[best]),
            probabilities=dict(zip(manifest.classes, probabilities.tolist(), strict=True)),
            model_version=manifest.version,
            variant=manifest.variant,
            duration_s=time.perf_counter() - started,
        )

    def _run(self, image: ImageArray) -> npt.NDArray[np.float64]:
        """Logits [C] of one image [S, S, 3]."""
        try:
            (logits,) = self._session.run([OUTPUT_NAME], {INPUT_NAME: image[np.newaxis]})
        except Exception as error:  # ONNX Runtime has no error type of its own.
            raise InferenceError(f"Model {self.manifest.version} failed: {_first_line(error)}.") from None
        if logits.shape != (1, len(self.manifest.classes)) or not np.isfinite(logits).all():
            raise InferenceError(
                f"Model {self.manifest.version} answered with {list(logits.shape)} logits that are not all finite or "
                f"not {len(self.manifest.classes)}.",
                cure="Roll back to the previous version.",
            )
        return np.asarray(logits[0], dtype=np.float64)


def _open_session(model: Path | bytes, manifest: ReleaseManifest, threads: int) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = _ERRORS_ONLY
    # Idle threads sleep instead of spinning: a vehicle's cores have other work.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    # Without VNNI, unsigned-by-signed int8 products saturate silently; unsigned-by-unsigned ones do not.
    options.add_session_config_entry("session.x64quantprecision", "1")
    source = model if isinstance(model, bytes) else str(model)
    try:
        return ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime has no error type of its own.
        raise IntegrityError(
            f"The model file of {manifest.version} cannot be loaded: {_first_line(error)}.",
            cure="Release it again, or roll back.",
        ) from None


def _check_interface(session: ort.InferenceSession, manifest: ReleaseManifest) -> None:
    size, classes = manifest.image_size, len(manifest.classes)
    expected_input = (INPUT_NAME, "tensor(uint8)", [size, size, 3])
    expected_output = (OUTPUT_NAME, "tensor(float)", [classes])
    for nodes, expected in ((session.get_inputs(), expected_input), (session.get_outputs(), expected_output)):
        actual = [(node.name, node.type, node.shape[1:]) for node in nodes]
        if actual != [expected]:
            raise IntegrityError(
                f"The model of {manifest.version} has {actual} (name, type, shape of one), not {[expected]} as its "
                "manifest says.",
                cure="Release it again, or roll back.",
            )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
