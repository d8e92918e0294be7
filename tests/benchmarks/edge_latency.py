"""One image at a time, as a vehicle sees them: ONNX Runtime's variants beside torch, in turn, on one thread.

Run by ``make bench-edge`` on the current release of the state folder (``make run`` first). Writes
docs/benchmarks/edge_latency.json and docs/benchmarks.md.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from edge_runtime.engine import InferenceEngine
from fedvit.cli.state import open_existing_store
from fedvit.data.sources import open_source
from fedvit.models.build import build_model
from fedvit.models.trainable import load_trainable_weights
from fedvit.settings import load_settings
from fedvit.wire.images import decode_image
from fedvit.wire.manifest import load_or_create_signing_key, verify_manifest
from fedvit.wire.tensors import decode_weights
from tests.benchmarks.results import write_result

IMAGES = 200
ROUNDS = 5
MAX_WEIGHTS_BYTES = 2**30


def main() -> None:
    """Measure and write."""
    torch.set_num_threads(1)
    settings = load_settings()
    store = open_existing_store(settings)
    release = store.releases.current()
    if release is None:
        raise SystemExit("Nothing is released yet: run `make run` first.")
    source = open_source(settings.data)
    images = [source.read(record) for record in source.test[:IMAGES]]
    trusted = [load_or_create_signing_key(store.home / "keys").public_key()]

    model = build_model(settings.model, len(source.classes), settings.data.image_size)
    weights = store.blobs.get(store.versions.get(release.version).weights_digest)
    load_trainable_weights(model, decode_weights(weights, max_bytes=MAX_WEIGHTS_BYTES))

    @torch.inference_mode()
    def infer_torch(image: bytes) -> object:
        return model(torch.from_numpy(decode_image(image, settings.data.image_size))[None]).argmax()

    contestants: dict[str, Callable[[bytes], object]] = {"torch": infer_torch}
    for variant, digest in release.artifacts.items():
        manifest = verify_manifest(release.envelopes[variant], trusted)
        contestants[f"onnxruntime {variant}"] = InferenceEngine(store.blobs.get(digest), manifest).infer

    times_ms = _interleaved(contestants, images)
    figures = {
        name: {
            "p50_ms": round(statistics.median(values), 3),
            "p95_ms": round(statistics.quantiles(values, n=20)[-1], 3),
        }
        for name, values in times_ms.items()
    }
    baseline = figures["torch"]["p50_ms"]
    write_result(
        "edge_latency",
        title="Edge latency",
        what=f"{len(images)} real test images, one by one, from bytes to class, one thread; {ROUNDS} rounds in turn.",
        command="make bench-edge",
        figures=figures,
        ratios={f"torch / {n}": round(baseline / f["p50_ms"], 2) for n, f in figures.items() if n != "torch"},
    )


def _interleaved(contestants: dict[str, Callable[[bytes], object]], images: list[bytes]) -> dict[str, list[float]]:
    times_ms: dict[str, list[float]] = {name: [] for name in contestants}
    for infer in contestants.values():
        infer(images[0])
    for _ in range(ROUNDS):
        for image in images:
            for name, infer in contestants.items():
                started_s = time.perf_counter()
                infer(image)
                times_ms[name].append(1000 * (time.perf_counter() - started_s))
    return times_ms


if __name__ == "__main__":
    main()
