"""The numerical linear algebra of convolutional layers.

Note [Lazy names]. ``__init__.pyi`` is the list of public names; each is imported when it is first
used, so that the command's help does not wait for torch. A module may not have the name of a public
function that it holds: importing it would put it in the function's place.
"""

import lazy_loader as _lazy

_names, __dir__, __all__ = _lazy.attach_stub(__name__, __file__)


def __getattr__(name: str) -> object:
    if name == "__version__":
        from importlib.metadata import version  # a third of the time that the help takes

        return version("convspectra")
    return _names(name)
