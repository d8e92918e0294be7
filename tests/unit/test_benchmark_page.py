"""The benchmark page is generated from the results that are checked in."""

from __future__ import annotations

import json
from pathlib import Path

from tests.benchmarks.results import FOLDER, page


def test_the_page_is_what_the_results_say() -> None:
    results = [json.loads(path.read_text()) for path in sorted(Path(FOLDER).glob("*.json"))]
    assert results
    assert (FOLDER.parent / "benchmarks.md").read_text() == page(results)
    for result in results:
        assert set(result) == {"title", "what", "command", "figures", "ratios", "machine", "measured"}
