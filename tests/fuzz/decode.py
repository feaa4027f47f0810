"""Fuzzing of the decode path: any bytes give pixels or a RequestError of one line, soon.

    pip install atheris
    python tests/fuzz/decode.py --seeds FOLDER       # once: the odd images, a file each
    python tests/fuzz/decode.py FOLDER -max_total_time=600 -timeout=10 -rss_limit_mb=2048

Run by hand: atheris has no wheels for every Python, and minutes find what seconds do not. It sees
the branches of Pillow's Python and of ours, not those of libjpeg or libtiff. What it finds becomes
a case in tests/serve/odd_images.py.
"""

import sys
import warnings
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT))

#: Seeds are kept short: libFuzzer mutates small files best.
MAX_SEED_BYTES = 20_000
MAX_PIXELS = 300_000


def write_seeds(folder: Path) -> None:
    from tests.support.odd_images import CASES

    folder.mkdir(parents=True, exist_ok=True)
    for name, (make, _) in CASES.items():
        body = make()
        if len(body) <= MAX_SEED_BYTES:
            (folder / name).write_bytes(body)


def main() -> None:
    if sys.argv[1:2] == ["--seeds"]:
        write_seeds(Path(sys.argv[2]))
        return
    import atheris  # type: ignore[import-untyped]

    with atheris.instrument_imports(include=["PIL", "pcae_serve"]):
        from PIL import Image

        Image.init()  # the parsers, which are imported at the first file otherwise
        from pcae_serve.bundle.preprocess import Preprocess
        from pcae_serve.errors import RequestError

    preprocess = Preprocess(32, 36, (0.5,) * 3, (0.5,) * 3)

    def decode(body: bytes) -> None:
        try:
            pixels = preprocess(body, MAX_PIXELS)
        except RequestError as error:
            refused = error
        else:
            assert (pixels.shape, str(pixels.dtype)) == ((32, 32, 3), "uint8")
            return
        assert refused.status in (400, 413, 415), refused.status
        assert "\n" not in refused.detail, refused.detail
        assert len(refused.detail) < 500, refused.detail

    warnings.simplefilter("ignore")
    atheris.Setup(sys.argv, decode)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
