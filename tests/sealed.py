"""Files with the seal of what they hold, whatever that is: no damage, but what someone has made of them."""
from __future__ import annotations

from pathlib import Path
from typing import Mapping

import numpy as np
from safetensors.numpy import save

from samplers.learning.storage import digest, seal


def sealed(tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> bytes:
    own = seal(metadata.get("format", ""), metadata.get("about", "{}"), digest(tensors))
    return save(dict(tensors), {**metadata, "seal": own})


def write_sealed(path: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    path.write_bytes(sealed(tensors, metadata))
