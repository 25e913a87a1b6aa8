# SPDX-License-Identifier: Apache-2.0
"""Errors that a user can act on; the command line turns these into one line.

A message names the file or parameter, what was found, what is allowed and what to do.
They are ``ValueError``s too, because vLLM reports those from a config as bad input.
"""


class RSparseError(ValueError):
    """Base class of every error that this project raises for its users."""


class SettingError(RSparseError):
    """An option, variable or key of a config whose value cannot be used."""


class ArtifactError(RSparseError):
    """An artifact that cannot be used."""


class CheckpointError(RSparseError):
    """A base model, or text for it, that cannot be read or is not supported."""


class DeviceError(RSparseError):
    """A requested device that is not available."""


class DamagedCheckpointError(CheckpointError):
    """Tensors of a base model that do not fit together.

    The remedy changes the weights, so earlier results are useless.
    """


class NotFiniteError(RSparseError):
    """Weights or activations contain NaN or infinity.

    The remedy changes the weights or the dtype, so earlier results are useless.
    """


class PrepareError(RSparseError):
    """``prepare`` cannot run with these settings, or cannot write its output."""


class BuildError(RSparseError):
    """The CPU kernel cannot be compiled or loaded on this machine."""


class NodesDisagreeError(RSparseError):
    """Nodes of one server differ where they must be equal."""
