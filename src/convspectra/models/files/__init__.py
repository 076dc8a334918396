"""Models out of files: ONNX, TorchScript, exported programs and checkpoints."""

from convspectra.models.files._errors import LoadError as LoadError
from convspectra.models.files._load import load_module as load_module
from convspectra.models.files._load import load_operators as load_operators
