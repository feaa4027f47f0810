"""A teacher from an ONNX file, run by ONNX Runtime."""

import sys
from pathlib import Path

import numpy as np
import onnxruntime as ort
import torch
from torch import Tensor

from pcae_serve.bundle.preprocess import Preprocess
from pcae_serve.errors import PcaeError, one_line

_TYPES = {"tensor(uint8)": np.uint8, "tensor(float)": np.float32, "tensor(float16)": np.float16}
#: Images of the trial run that shows whether the outputs are logits or probabilities.
_TRIAL = 4


class OnnxTeacher:
    """A graph with one input of pixels and a first output [N, classes].

    Its input is uint8 [N, S, S, 3] or [N, 3, S, S], or the same in float16 or float32. Integers
    are pixels from 0 to 255; floats are normalised as for the model that learns. Rows of the output
    that sum to 1 are probabilities, all others logits.
    """

    def __init__(
        self, path: Path, classes: int, preprocess: Preprocess, device: torch.device
    ) -> None:
        """Load a graph. Raise PcaeError if it cannot be a teacher for these classes and images."""
        self.path, self.preprocess = path, preprocess
        if not path.is_file():
            raise PcaeError(f"--teacher {path}: there is no such file")
        options = ort.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        # spinning threads take CPU time from torch's
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.log_severity_level = 3  # errors only
        providers = [*["CUDAExecutionProvider"] * (device.type == "cuda"), "CPUExecutionProvider"]
        usable = [name for name in providers if name in ort.get_available_providers()]
        try:
            self._session = ort.InferenceSession(str(path), options, providers=usable)
        except Exception as error:  # ONNX Runtime raises a dozen types of its own
            raise PcaeError(f"--teacher {path} does not load: {one_line(error)}") from None
        self._read_input(preprocess.image_size)
        self._probabilities = False
        outputs = self._run(self._trial())
        if outputs.ndim != 2 or outputs.shape[1] != classes:
            shape = " x ".join(map(str, outputs.shape[1:]))
            raise PcaeError(
                f"--teacher {path} gives {shape} numbers an image, and the images have {classes}"
                " classes"
            )
        sums = outputs.sum(dim=1)
        self._probabilities = bool((outputs >= 0).all() and ((sums - 1).abs() < 1e-3).all())
        what = "probabilities" if self._probabilities else "logits"
        taken = "pixels" if self._type == np.uint8 else "images normalised as for the model"
        print(f"--teacher {path}: takes {taken}, gives {what}", file=sys.stderr)

    def __call__(self, pixels: Tensor) -> Tensor:
        """Return probabilities, float32 [B, classes], of pixels [B, 3, S, S] in [0, 255]."""
        outputs = self._run(pixels.detach().float().cpu().numpy())
        if not self._probabilities:
            outputs = outputs.softmax(dim=1)
        return outputs.to(pixels.device, non_blocking=True)

    def _read_input(self, size: int) -> None:
        """Read the layout of the input. Raise PcaeError if it cannot be images of this size."""
        inputs = self._session.get_inputs()
        names = ", ".join(f"{each.name} {each.type} {each.shape}" for each in inputs)
        first = inputs[0]
        shape = list(first.shape)
        if len(inputs) != 1 or len(shape) != 4 or first.type not in _TYPES or 3 not in shape[1::2]:
            raise PcaeError(
                f"--teacher {self.path} has the inputs {names}; a teacher takes images alone, uint8"
                " or float, [N, S, S, 3] or [N, 3, S, S]"
            )
        self._name, self._type = first.name, _TYPES[first.type]
        self._channels_last = shape[1] != 3
        sides = shape[1:3] if self._channels_last else shape[2:]
        if any(isinstance(side, int) and side != size for side in sides):
            raise PcaeError(
                f"--teacher {self.path} takes images of {sides[0]} x {sides[1]} pixels, and the"
                f" model of {size} x {size}; both see the same pixels, so they must be equal"
            )
        if isinstance(shape[0], int):
            raise PcaeError(
                f"--teacher {self.path} takes {shape[0]} image{'s' * (shape[0] > 1)} at a time;"
                " export it with a dynamic batch size"
            )

    def _trial(self) -> np.ndarray:
        size = self.preprocess.image_size
        return np.random.default_rng(0).uniform(0, 255, (_TRIAL, 3, size, size)).astype(np.float32)

    def _run(self, pixels: np.ndarray) -> Tensor:
        """Return the first output, float32, for pixels float32 [B, 3, S, S] in [0, 255]."""
        if self._type == np.uint8:
            values = np.clip(np.rint(pixels), 0, 255)  # erased rectangles are outside
        else:
            mean, std = (
                np.array(numbers, dtype=np.float32).reshape(1, 3, 1, 1)
                for numbers in (self.preprocess.mean, self.preprocess.std)
            )
            values = (pixels / 255 - mean) / std
        if self._channels_last:
            values = values.transpose(0, 2, 3, 1)
        feeds = {self._name: np.ascontiguousarray(values, dtype=self._type)}
        try:
            outputs = self._session.run(None, feeds)
        except Exception as error:  # ONNX Runtime raises a dozen types of its own
            raise PcaeError(f"--teacher {self.path} failed: {one_line(error)}") from None
        return torch.from_numpy(np.asarray(outputs[0], dtype=np.float32))
