"""What every peer's handler shares: the model file, Pillow for the pixels, ONNX Runtime.

    COMPARE_MODEL=model.json COMPARE_TIER=full python handler.py IMAGE CORE

prints the bare engine's times on one core as JSON.

Pixels equal those of the server's own preprocessing for a JPEG below twice its size of decoding at
a reduced scale, without the server's checks of hostile files. Only logits are computed.
"""

import io
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from PIL import Image

Pixels = NDArray[np.uint8]

#: Batch sizes that the bare engine is timed at, and for how long each.
BATCHES, SECONDS = (1, 2, 4, 8, 16, 32), 2.0


class Model:
    """A graph at one tier, on one thread: the server has one core."""

    def __init__(self) -> None:
        """Load the model that the environment names. Raise KeyError if it names none."""
        path = Path(os.environ["COMPARE_MODEL"])
        described: dict[str, Any] = json.loads(path.read_text())
        self.image_size, self.resize = described["image_size"], described["resize"]
        self.labels: list[str] = described["labels"]
        counts = described["tiers"][os.environ["COMPARE_TIER"]]
        self._counts = np.array(counts, dtype=np.int64)
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        self._session = ort.InferenceSession(
            str(path.parent / described["graph"]), options, providers=["CPUExecutionProvider"]
        )

    def pixels(self, body: bytes) -> Pixels:
        """Decode an image file to the centre of the resized image, uint8 [H, W, 3]."""
        image = Image.open(io.BytesIO(body)).convert("RGB")
        side = self.image_size
        resized = [s * self.resize // min(image.size) for s in image.size]
        if resized == list(image.size) == [side, side]:
            return np.asarray(image)
        low = [(r - side) // 2 for r in resized]
        scale = [s / r for s, r in zip(image.size, resized, strict=True)]
        box = (
            low[0] * scale[0],
            low[1] * scale[1],
            min(image.width, (low[0] + side) * scale[0]),
            min(image.height, (low[1] + side) * scale[1]),
        )
        return np.asarray(image.resize((side, side), Image.Resampling.BICUBIC, box))

    def classify(self, pixels: Pixels) -> list[int]:
        """Return the index of the best class of each image in uint8 [N, H, W, 3]."""
        feeds = {"pixels": pixels, "token_counts": self._counts}
        (logits,) = self._session.run(["logits"], feeds)
        return [int(index) for index in logits.argmax(axis=1)]

    def answer(self, index: int) -> dict[str, Any]:
        return {"index": index, "label": self.labels[index]}


def bare_ms(model: Model, body: bytes) -> dict[str, Any]:
    """Return milliseconds of CPU time of decoding and of batches, which take turns; medians.

    On one thread CPU time is the time that it takes, without that of other processes.
    """
    pixels = model.pixels(body)
    batches = {n: np.stack([pixels] * n) for n in BATCHES}
    times: dict[Any, list[float]] = {"decode": [], **{n: [] for n in BATCHES}}
    for batch in batches.values():
        model.classify(batch)
    end_s = time.perf_counter() + SECONDS * len(BATCHES)
    while time.perf_counter() < end_s:
        for name in times:
            begin_s = time.process_time()
            if name == "decode":
                model.pixels(body)
            else:
                model.classify(batches[name])
            times[name].append(1e3 * (time.process_time() - begin_s))
    median = {name: float(np.median(ms)) for name, ms in times.items()}
    return {"decode_ms": median.pop("decode"), "batch_ms": {str(n): median[n] for n in BATCHES}}


if __name__ == "__main__":
    os.sched_setaffinity(0, {int(sys.argv[2])})
    print(json.dumps(bare_ms(Model(), Path(sys.argv[1]).read_bytes())))
