"""The peers' own environments, with pinned versions, in an ignored folder."""

import json
import subprocess
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
FOLDER = ROOT / ".cache" / "compare"
#: Debian's own interpreter: the stub of Triton's Python backend is linked with its library.
BASE = "/usr/bin/python3.11"


def python(name: str) -> str:
    """Return the interpreter of an environment."""
    return str(FOLDER / "envs" / name / "bin" / "python")


def install(name: str) -> None:
    """Create an environment unless it exists. Raise CalledProcessError if a version is missing."""
    folder = FOLDER / "envs" / name
    stamp = folder / "installed.json"
    if stamp.exists():
        return
    wanted = ["-r", str(HERE / "requirements" / f"{name}.txt")]
    if name == "pcae":  # the checkout is imported from its folder; this installs what it needs
        wanted = ["-c", str(ROOT / "constraints.txt"), f"{ROOT}[cpu]"]
    print(f"installing {name}", flush=True)
    begin_s = time.monotonic()
    subprocess.run([BASE, "-m", "venv", "--clear", str(folder)], check=True)
    empty = _bytes(folder)
    quiet = ["-q", "--disable-pip-version-check"]
    subprocess.run([python(name), "-m", "pip", "install", *quiet, *wanted], check=True)
    size = {"install_mb": (_bytes(folder) - empty) / 1e6}
    stamp.write_text(json.dumps(size | {"install_s": time.monotonic() - begin_s}))


def install_mb(name: str) -> float:
    """Return the size of an environment's packages in MB, without pip."""
    found: dict[str, float] = json.loads((FOLDER / "envs" / name / "installed.json").read_text())
    return found["install_mb"]


def _bytes(folder: Path) -> int:
    return sum(file.lstat().st_size for file in folder.rglob("*") if not file.is_dir())
