"""Lack of memory while an image is decoded."""

import subprocess
import sys

PROGRAM = """
import io, resource
from pathlib import Path
from PIL import Image
from pcae_serve.bundle import decode_cost, image_limits
from pcae_serve.bundle.preprocess import Preprocess
from pcae_serve.runtime.decode_call import decode_image

preprocess = Preprocess(224, 256, (0.5,) * 3, (0.5,) * 3)
Image.linear_gradient("L").resize((1500, 1500)).save(file := io.BytesIO(), "WEBP", method=0)
body = file.getvalue()
needed = decode_cost.predict(image_limits.read_layout(body, 10**8), len(body)).bytes
decode_image(preprocess, body, 10**8, needed)
space = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
for share in range(1, 25):
    resource.setrlimit(resource.RLIMIT_AS, (space + needed * share // 12, -1))
    try:
        decode_image(preprocess, body, 10**8, needed)
        print("decoded")
    except MemoryError:
        print("no memory")
    resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
"""


def test_a_good_image_is_never_damaged_for_lack_of_memory() -> None:
    """libwebp reports a failed allocation as a damaged file."""
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.split("\n")) == {"decoded", "no memory", ""}
