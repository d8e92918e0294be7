"""Search for a faster variant of the current release: build, benchmark, canary, release.

Latency is measured for the model alone, on this machine, with one thread and one held-out image at a time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fedvit.config import Settings
from fedvit.errors import ModelError, ReleaseRefusedError
from fedvit.operations.runner import Task
from fedvit.ports import ExportedModel, ModelBenchmark, ServerModelPort
from fedvit.registry.publisher import Publisher, artifacts_of, served_variant, stored_weights
from fedvit.store.records import Release
from fedvit.store.store import Store
from fedvit.types import Variant

CANDIDATES: Mapping[str, tuple[Variant, ...]] = {
    "quantization": (Variant.STANDARD_INT8, Variant.EDGE_OPTIMIZED_FP32, Variant.EDGE_OPTIMIZED),
    "lighter_variant": (Variant.EDGE_OPTIMIZED_FP32, Variant.EDGE_OPTIMIZED),
}


@dataclass(frozen=True, slots=True)
class VariantCandidate:
    """One variant, exported and benchmarked on all held-out images."""

    variant: Variant
    export: ExportedModel
    benchmark: ModelBenchmark

    def figures(self) -> dict[str, Any]:
        """Its part of the operation's result."""
        return {
            "variant": self.variant.value,
            "p50_ms": round(self.benchmark.p50_ms, 4),
            "p95_ms": round(self.benchmark.p95_ms, 4),
            "size_bytes": len(self.export.content),
            "accuracy": self.export.accuracy,
            "agreement": self.export.agreement,
        }


class Optimizer:
    """The work of ``optimize``: parameters ``strategy`` (a key of ``CANDIDATES``) and ``target_latency_ms`` (p95)."""

    def __init__(self, settings: Settings, store: Store, publisher: Publisher, model: ServerModelPort) -> None:
        self._settings, self._store, self._publisher, self._model = settings, store, publisher, model

    def admit(self, params: Mapping[str, Any]) -> None:
        """Raise ConflictError where nothing is released yet."""
        self._publisher.current()

    def work(self, task: Task) -> dict[str, Any]:
        """Benchmark the strategy's candidates, and let the fleet serve the most accurate one that is fast enough.

        Without such a candidate nothing changes; the result shows it.

        Raises:
            ConflictError: nothing is released, or another version was released meanwhile.
            OperationCancelled: it was cancelled; nothing has changed.
        """
        release = self._publisher.current()
        served = served_variant(release, self._settings)
        content = self._store.blobs.get(release.artifacts[served])
        task.report(0.02, f"measuring {served}, which serves now")
        result: dict[str, Any] = {
            "strategy": task.params["strategy"],
            "target_latency_ms": task.params["target_latency_ms"],
            "measured": "the model alone on this machine, one thread, one held-out image at a time",
            "from_version": release.version,
            "serving": self._served_figures(release, served, self._model.benchmark(content)),
        }
        candidates, unbuilt = self._measured(task, release)
        fit = [c for c in candidates if c.benchmark.p95_ms <= task.params["target_latency_ms"]]
        fit.sort(key=lambda c: (-c.export.accuracy, c.benchmark.p95_ms))
        outcome, rejections = self._first_that_passes(task, release, served, content, fit)
        figures = [c.figures() | {"rejected": rejections.get(c.variant)} for c in candidates]
        best = min(candidates, key=lambda c: c.benchmark.p95_ms).figures() if candidates else None
        return result | {"target_met": bool(fit), "best": best, "candidates": figures + unbuilt} | outcome

    def _measured(self, task: Task, release: Release) -> tuple[list[VariantCandidate], list[dict[str, Any]]]:
        weights = stored_weights(self._store, self._store.versions.get(release.version).weights_digest)
        variants = CANDIDATES[task.params["strategy"]]
        candidates, unbuilt = [], []
        for index, variant in enumerate(variants):
            task.report(0.1 + 0.6 * index / len(variants), f"building and measuring {variant.value}")
            try:
                export = self._model.export(weights, variant)
            except ModelError as error:
                unbuilt.append({"variant": variant.value, "rejected": error.message})
                continue
            candidates.append(VariantCandidate(variant, export, self._model.benchmark(export.content)))
        return candidates, unbuilt

    def _first_that_passes(
        self, task: Task, release: Release, served: str, serving: bytes, fit: list[VariantCandidate]
    ) -> tuple[dict[str, Any], dict[Variant, str]]:
        """The outcome, and why earlier candidates were rejected."""
        rejections: dict[Variant, str] = {}
        for candidate in fit:
            if candidate.variant.value == served:
                return _unchanged(release, f"{served} serves already."), rejections
            task.report(0.75, f"canary of {candidate.variant.value}")
            agreement = self._canary(candidate.export.content, serving)
            if agreement < self._settings.release.min_canary_agreement:
                rejections[candidate.variant] = (
                    f"in the canary it agreed with {served} on {agreement:.2%} of the images; "
                    f"{self._settings.release.min_canary_agreement:.2%} are needed"
                )
                continue
            task.report(0.9, f"releasing {candidate.variant.value}")
            try:
                return self._release(task, release, candidate, agreement), rejections
            except ReleaseRefusedError as error:
                rejections[candidate.variant] = error.message
        reason = "No candidate that is fast enough is good enough." if fit else "No candidate meets the target latency."
        return _unchanged(release, reason), rejections

    def _canary(self, candidate: bytes, serving: bytes) -> float:
        """The share of held-out images on which both predict the same class."""
        images = self._settings.release.canary_images
        predicted, expected = (self._model.benchmark(content, images).predicted for content in (candidate, serving))
        return sum(a == b for a, b in zip(predicted, expected, strict=True)) / len(expected)

    def _release(self, task: Task, release: Release, candidate: VariantCandidate, agreement: float) -> dict[str, Any]:
        lineage = {
            "optimized_from": release.version,
            "strategy": task.params["strategy"],
            "target_latency_ms": task.params["target_latency_ms"],
            "canary_agreement": agreement,
            "operation_id": task.operation.operation_id,
            **candidate.figures(),
        }
        reason = f"optimised for {task.params['target_latency_ms']:g} ms: {candidate.variant.value}"
        adopted = self._publisher.adopt(release.version, candidate.variant, candidate.export, lineage, reason)
        return {
            "switched": True,
            "version": adopted.version,
            "variant": candidate.variant.value,
            "canary_agreement": agreement,
            "reason": reason,
        }

    def _served_figures(self, release: Release, served: str, benchmark: ModelBenchmark) -> dict[str, Any]:
        artifact = artifacts_of(release)[served]
        return {
            "variant": served,
            "p50_ms": round(benchmark.p50_ms, 4),
            "p95_ms": round(benchmark.p95_ms, 4),
            "size_bytes": artifact.size_bytes,
            "accuracy": artifact.metrics.get("accuracy"),
            "agreement": artifact.metrics.get("agreement"),
        }


def _unchanged(release: Release, reason: str) -> dict[str, Any]:
    return {"switched": False, "version": release.version, "reason": reason}
