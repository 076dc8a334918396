"""Models out of files: ONNX, TorchScript, exported programs and checkpoints, as `Target`s."""

from convspectra.loading.errors import LoadError as LoadError
from convspectra.loading.load import load_targets as load_targets
