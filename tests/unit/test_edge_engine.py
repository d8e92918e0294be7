from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper
from raises import raises_naming
from tiny_release import CLASSES, IMAGE_SIZE, manifest_of, png, tiny_model

from edge_runtime.engine import InferenceEngine
from fedvit.errors import DataError, InferenceError, IntegrityError


@pytest.fixture(scope="module")
def engine() -> InferenceEngine:
    content = tiny_model()
    return InferenceEngine(content, manifest_of(content))


@pytest.mark.parametrize(("index", "colour"), [(0, (255, 0, 0)), (1, (0, 255, 0)), (2, (0, 0, 255))])
def test_a_colour_is_recognised(engine: InferenceEngine, index: int, colour: tuple[int, int, int]) -> None:
    prediction = engine.infer(png(colour))
    assert prediction.class_index == index
    assert prediction.label == CLASSES[index]
    assert prediction.confidence == max(prediction.probabilities.values()) == prediction.probabilities[CLASSES[index]]
    assert prediction.confidence > 0.99
    assert prediction.duration_s > 0
    assert (prediction.model_version, prediction.variant) == ("v0.0.1", "standard")


def test_probabilities_are_the_softmax_of_the_logits(engine: InferenceEngine) -> None:
    colour = (32, 16, 0)
    exponentials = np.exp(np.array(colour) / 16)
    probabilities = engine.infer(png(colour)).probabilities
    np.testing.assert_allclose(list(probabilities.values()), exponentials / exponentials.sum(), rtol=1e-6)
    assert list(probabilities) == list(CLASSES)


def test_large_logits_do_not_overflow() -> None:
    content = tiny_model(tilt=1e6)
    prediction = InferenceEngine(content, manifest_of(content)).infer(png((0, 255, 0)))
    assert sum(prediction.probabilities.values()) == pytest.approx(1)


def test_a_file_serves_like_its_bytes(engine: InferenceEngine, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(tiny_model())
    from_file = InferenceEngine(path, engine.manifest, threads=2)
    assert from_file.infer(png()).probabilities == engine.infer(png()).probabilities


def test_threads_share_an_engine(engine: InferenceEngine) -> None:
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255)] * 20
    with ThreadPoolExecutor(4) as pool:
        labels = pool.map(lambda colour: engine.infer(png(colour)).label, colours)
    assert list(labels) == list(CLASSES) * 20


def test_a_bad_image_is_the_callers_fault(engine: InferenceEngine) -> None:
    with pytest.raises(DataError):
        engine.infer(b"junk")


@pytest.mark.parametrize("content", [b"", b"no model", tiny_model()[:-30]], ids=["empty", "text", "cut"])
def test_what_is_no_model_is_refused(content: bytes) -> None:
    with raises_naming(IntegrityError, "v0.0.1"):
        InferenceEngine(content, manifest_of(b"x"))


def test_a_missing_model_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(IntegrityError):
        InferenceEngine(tmp_path / "absent.onnx", manifest_of(b"x"))


@pytest.mark.parametrize(
    "content",
    [tiny_model(image_size=32), tiny_model(classes=4), tiny_model(output="scores")],
    ids=["image size", "classes", "output name"],
)
def test_a_model_that_is_not_what_its_manifest_says_is_refused(content: bytes) -> None:
    with pytest.raises(IntegrityError):
        InferenceEngine(content, manifest_of(content))


def logarithm(colour: float) -> bytes:
    """log(colour - mean): not a number for images lighter than ``colour``."""
    graph = helper.make_graph(
        [
            helper.make_node("Cast", ["images"], ["floats"], to=TensorProto.FLOAT),
            helper.make_node("ReduceMean", ["floats", "axes"], ["means"], keepdims=0),
            helper.make_node("Sub", ["colour", "means"], ["differences"]),
            helper.make_node("Log", ["differences"], ["logits"]),
        ],
        "logarithm",
        [helper.make_tensor_value_info("images", TensorProto.UINT8, ["batch", IMAGE_SIZE, IMAGE_SIZE, 3])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 3])],
        [
            numpy_helper.from_array(np.array([1, 2], dtype=np.int64), "axes"),
            numpy_helper.from_array(np.array(colour, dtype=np.float32), "colour"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    content: bytes = model.SerializeToString()
    return content


def test_a_model_whose_first_run_fails_is_refused() -> None:
    content = logarithm(-1)
    with pytest.raises(IntegrityError):
        InferenceEngine(content, manifest_of(content))


def test_an_answer_that_is_not_finite_is_an_error_and_not_a_class() -> None:
    content = logarithm(200)
    engine = InferenceEngine(content, manifest_of(content))
    assert engine.infer(png((0, 100, 100))).label == "red"
    with pytest.raises(InferenceError):
        engine.infer(png((255, 0, 0)))
