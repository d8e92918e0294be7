"""Makes the file of :func:`fedvit.models.whitening.lite0_whitening` anew: ``python -m tests.whitening PHOTOGRAPHS``.

PHOTOGRAPHS are files of public photographs of anything; the file was made of five that come with scikit-image 0.26:
astronaut.png, chelsea.png, coffee.png, motorcycle_left.png, rocket.jpg. No data set of fedvit is among them.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

from fedvit.config import ModelConfig
from fedvit.models import whitening
from fedvit.models.build import build_model
from fedvit.models.vision import FEATURE_BATCH

_CROPS, _SMALLEST, _LARGEST, _SIDE = 3000, 20, 200, 64


def crops(paths: list[Path], count: int = _CROPS) -> torch.Tensor:
    """Square crops of all sizes at random places, half of them mirrored: uint8 [count, 64, 64, 3]."""
    draw, photographs = np.random.default_rng(0), [Image.open(path).convert("RGB") for path in paths]
    found = []
    for index in range(count):
        whole = photographs[index % len(photographs)]
        side = int(np.exp(draw.uniform(np.log(_SMALLEST), np.log(_LARGEST))))
        left, top = (int(draw.integers(0, length - side + 1)) for length in whole.size)
        crop = whole.crop((left, top, left + side, top + side)).resize((_SIDE, _SIDE), Image.Resampling.BILINEAR)
        found.append(np.asarray(crop)[:, :: draw.choice((-1, 1))])
    return torch.from_numpy(np.stack(found))


def main(paths: list[Path]) -> None:
    """Write the file."""
    torch.set_num_threads(1)
    model = build_model(ModelConfig(), 2, _SIDE)
    features = torch.cat([model.features(batch) for batch in crops(paths).split(FEATURE_BATCH)])
    save_file(whitening.whitening_of(features), Path(whitening.__file__).with_name("lite0_whitening.safetensors"))


if __name__ == "__main__":
    main([Path(name) for name in sys.argv[1:]])
