"""Writes local.yaml, aws.yaml and gcp.yaml: the template, with what each provider has of its own from parts/.

python cluster_configs/ray/render.py
"""

from __future__ import annotations

from pathlib import Path

HERE = Path(__file__).parent
NAMES = ("local", "aws", "gcp")


def rendered(name: str) -> str:
    """The file ``name``.yaml as it should be."""
    part = (HERE / "parts" / f"{name}.yaml").read_text()
    text = (HERE / "template.yaml").read_text().replace("@PROVIDER@\n", part)
    return text.replace("@NAME@", name)


def main() -> None:
    """Write all three."""
    for name in NAMES:
        (HERE / f"{name}.yaml").write_text(rendered(name))


if __name__ == "__main__":
    main()
