"""A model of a few hundred bytes that says which of three colours an image is, and releases of it."""

from __future__ import annotations

import hashlib
import io
from dataclasses import dataclass, field, replace
from typing import Any, BinaryIO

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from fedvit.errors import NotFoundError
from fedvit.wire.manifest import ReleaseManifest, sign_manifest

CLASSES = ("red", "green", "blue")
IMAGE_SIZE = 16


def tiny_model(tilt: float = 0.0, *, image_size: int = IMAGE_SIZE, classes: int = 3, output: str = "logits") -> bytes:
    """ONNX: images uint8 [B, S, S, 3] to the mean of each colour / 16 as logits [B, C]; ``tilt`` makes blobs differ."""
    weights = np.eye(3, classes, dtype=np.float32) / 16
    bias = np.full(classes, tilt, dtype=np.float32)
    nodes = [
        helper.make_node("Cast", ["images"], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["floats", "axes"], ["means"], keepdims=0),
        helper.make_node("MatMul", ["means", "weights"], ["products"]),
        helper.make_node("Add", ["products", "bias"], [output]),
    ]
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("images", TensorProto.UINT8, ["batch", image_size, image_size, 3])],
        [helper.make_tensor_value_info(output, TensorProto.FLOAT, ["batch", classes])],
        [
            numpy_helper.from_array(np.array([1, 2], dtype=np.int64), "axes"),
            numpy_helper.from_array(weights, "weights"),
            numpy_helper.from_array(bias, "bias"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    content: bytes = model.SerializeToString()
    return content


def manifest_of(content: bytes, sequence: int = 1, **changes: Any) -> ReleaseManifest:
    """A manifest that fits ``content``, with changes."""
    manifest = ReleaseManifest(
        sequence=sequence,
        version=f"v0.0.{sequence}",
        variant="standard",
        artifact_digest=hashlib.sha256(content).hexdigest(),
        artifact_bytes=len(content),
        classes=CLASSES,
        image_size=IMAGE_SIZE,
        run_id="run-1",
        round_index=3,
        data_digest="d" * 64,
        epsilon=1.5,
        delta=1e-5,
        privacy_unit="record",
        created_at="2026-01-01T00:00:00+00:00",
        metrics={"accuracy": 0.9},
    )
    return replace(manifest, **changes)


def png(colour: tuple[int, int, int] = (255, 0, 0), size: tuple[int, int] = (20, 12)) -> bytes:
    """A PNG of one colour."""
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, "PNG")
    return buffer.getvalue()


@dataclass
class MemoryFeed:
    """A feed without a network, which can lie."""

    key: Ed25519PrivateKey = field(default_factory=Ed25519PrivateKey.generate)
    envelope: str | None = None
    blobs: dict[str, bytes] = field(default_factory=dict)
    error: Exception | None = None
    downloads: int = 0

    def offer(self, content: bytes, sequence: int, **changes: Any) -> ReleaseManifest:
        """Sign and offer a release of ``content``."""
        manifest = manifest_of(content, sequence, **changes)
        self.blobs[manifest.artifact_digest] = content
        self.envelope = sign_manifest(manifest, self.key)
        return manifest

    def current(self, variant: str) -> str | None:
        """The envelope offered."""
        if self.error is not None:
            raise self.error
        return self.envelope

    def fetch(self, digest: str, size: int, file: BinaryIO) -> None:
        """The bytes offered under that name, whatever they are."""
        self.downloads += 1
        if digest not in self.blobs:
            raise NotFoundError(f"no {digest}")
        file.seek(0)
        file.truncate()
        file.write(self.blobs[digest])

    def close(self) -> None:
        """Nothing to give back."""
