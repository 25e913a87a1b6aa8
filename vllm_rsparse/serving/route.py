# SPDX-License-Identifier: Apache-2.0
"""``Route``: which implementation serves the linears, and which steps are sparse.

The precedence of the settings is stated here and nowhere else: the environment, then
the model's config, then the measured default of the device.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from vllm_rsparse import envs
from vllm_rsparse.errors import RSparseError
from vllm_rsparse.formats.fp8 import FP8
from vllm_rsparse.formats.fp8_block import FP8_BLOCK
from vllm_rsparse.formats.int4 import INT4
from vllm_rsparse.formats.int8_planes import INT8_PLANES
from vllm_rsparse.formats.plain import FLOAT
from vllm_rsparse.op.backends import Backend, resolve_backend

# Where a value came from if no setting names it.
DEFAULT = "default"

# Largest number of tokens for which the sparse route was faster than the dense one at
# 50% kept: on the H200 two (1.17x and 1.21x in two runs of vLLM), not four, whose masks
# together want 94% of the channels (kernels/README.md); on CPUs two (docs/cpu.md). Both
# are sizes for which vLLM captures a CUDA graph.
_DEFAULTS = {
    Backend.CPU: 2,
    Backend.CPU_TORCH: 1,
    Backend.TRITON: 2,
    # The definition is never fast; 16 covers every size that the kernels support.
    Backend.REFERENCE: 16,
}
# The four linears of Llama-3-8B on the H200 at two tokens: 96.5 us where 75% of the
# channels are read, 8 of them whatever is read; cuBLAS takes 117.4. They meet at 92%.
_BREAK_EVEN = 0.9
# The same in INT4 take 54.1 us where 94% is read, and dense 65 (four tokens).
_BREAK_EVEN_FOUR_BIT = 0.95
# Steps of two tokens on FP8 weights take 3.17 ms where 75% is read and 3.34 where 88%
# is, dense ones 3.35 (the same shapes and table).
_BREAK_EVEN_FP8 = 0.85
_BREAK_EVENS = {
    FP8.name: _BREAK_EVEN_FP8,
    INT4.name: _BREAK_EVEN_FOUR_BIT,
    INT8_PLANES.name: _BREAK_EVEN_FOUR_BIT,
}
# Not measured in the engine with more tokens.
_ONE_TOKEN = frozenset({FP8_BLOCK.name})


class DenseWeights(StrEnum):
    """Which copy of a linear's weight the steps that are not sparse multiply with.

    ``SHARED`` is the copy that the sparse route reads, an input channel per row.
    ``SEPARATE`` is a second one, the base model's own layer: dense steps are the base
    model's, bit for bit and at its speed, for twice the memory of the weights.
    """

    SHARED = "shared"
    SEPARATE = "separate"


@dataclass(frozen=True)
class Policy:
    """Which steps are sparse: those of at most ``max_sparse_tokens`` tokens.

    A linear sees the tokens of a whole step and not their phase. A policy by phase
    (draft sparse, verify dense) is another value here and another argument of the op.
    """

    max_sparse_tokens: int

    @property
    def always_dense(self) -> bool:
        """No step is sparse: the base model's own layers serve."""
        return self.max_sparse_tokens == 0


@dataclass(frozen=True)
class Route:
    """What was decided for a model.

    Attributes:
        backend: the implementation of the sparse route.
        policy: which steps take it.
        dense_weights: what the other steps multiply with.
        backend_source: the parameter that named the backend, or ``default``.
        policy_source: the parameter that set the policy, or ``default``.
    """

    backend: Backend
    policy: Policy
    dense_weights: DenseWeights = DenseWeights.SHARED
    backend_source: str = DEFAULT
    policy_source: str = DEFAULT

    def facts(self) -> dict[str, str]:
        """What must be the same on every rank, for comparison and for messages."""
        return {
            "backend": self.backend.label,
            "max_sparse_tokens": str(self.policy.max_sparse_tokens),
            "dense_weights": str(self.dense_weights),
        }

    def describe(self) -> str:
        """One line for messages: both values, and the parameters that set them."""
        limit = self.policy.max_sparse_tokens
        steps = (
            "everything is served dense"
            if self.policy.always_dense
            else f"sparse up to {limit} tokens per step, dense above"
        )
        return (
            f"{self.backend.label}, {steps} (backend: {self.backend_source},"
            f" tokens: {self.policy_source}); {self.dense_weights} dense weights"
        )


@dataclass(frozen=True)
class RouteRequest:
    """What one source of settings requests.

    Attributes:
        backend: a backend by name; None or ``auto`` leaves it to the next source.
        max_sparse_tokens: the switch point; None leaves it to the next source.
        dense_weights: a ``DenseWeights`` by name; None or ``auto`` leaves it to the
            next source.
        backend_name: the name of the backend's parameter in that source.
        policy_name: the name of the switch point's parameter.
        dense_name: the name of the parameter of ``dense_weights``.
    """

    backend: str | None
    max_sparse_tokens: int | None
    dense_weights: str | None
    backend_name: str
    policy_name: str
    dense_name: str

    @classmethod
    def of_environment(cls) -> "RouteRequest":
        """What this process's environment requests.

        Raises:
            ValueError: a variable's value is not allowed.
        """
        return cls(
            envs.backend(),
            envs.max_sparse_tokens(),
            envs.dense_weights(),
            envs.BACKEND,
            envs.MAX_SPARSE_TOKENS,
            envs.DENSE_WEIGHTS,
        )

    @classmethod
    def of_config(
        cls,
        where: str,
        backend: str | None,
        max_sparse_tokens: int | None,
        dense_weights: str | None,
    ) -> "RouteRequest":
        """What a dictionary of settings requests; ``where`` is its name in messages."""
        return cls(
            backend,
            max_sparse_tokens,
            dense_weights,
            f"{where}.backend",
            f"{where}.max_sparse_tokens",
            f"{where}.dense_weights",
        )


def choose_route(
    requests: Sequence[RouteRequest],
    device_type: str,
    read_fraction: float = 0.5,
    weight_format: str = FLOAT.name,
    weights_on_disk: str | None = None,
) -> Route:
    """Choose by the first request that names a value, else by the measured default.

    Args:
        requests: of the model's config, in order of precedence. The environment comes
            before all of them.
        device_type: where the model runs, ``cuda`` or ``cpu``.
        read_fraction: share of the linears' bytes that one token reads, in [0, 1].
        weight_format: the format of most of the sparse weights.
        weights_on_disk: the format in which ``prepare`` wrote them; None: the base's
            own are there.

    Raises:
        ValueError: a value that is unknown or cannot run here; names its parameter.
        BuildError: the backend ``cpu`` was requested by name and cannot be compiled.
    """
    requests = [RouteRequest.of_environment(), *requests]
    name, backend_source = "auto", DEFAULT
    for request in requests:
        if request.backend is not None and request.backend != "auto":
            name, backend_source = request.backend, request.backend_name
            break
    backend = resolve_backend(name, device_type, backend_source)
    dense_weights = _dense_weights(requests, weights_on_disk)
    for request in requests:
        limit = request.max_sparse_tokens
        if limit is not None:
            policy_source = request.policy_name
            break
    else:
        limit = default_max_sparse_tokens(backend, read_fraction, weight_format)
        policy_source = DEFAULT
    return Route(backend, Policy(limit), dense_weights, backend_source, policy_source)


def _dense_weights(
    requests: Sequence[RouteRequest], weights_on_disk: str | None
) -> DenseWeights:
    for request in requests:
        name = request.dense_weights
        if name is None or name == "auto":
            continue
        if name not in list(DenseWeights):
            allowed = ", ".join(DenseWeights)
            raise RSparseError(
                f"{request.dense_name} is {name!r}; allowed are auto, {allowed}"
            )
        if weights_on_disk is not None and name == DenseWeights.SEPARATE:
            raise RSparseError(
                f"{request.dense_name} is {name!r}, but the directory holds the linears"
                f" in {weights_on_disk} and not as the base model has them (prepare"
                " --copy-weights); use shared, or prepare without --copy-weights"
            )
        return DenseWeights(name)
    return DenseWeights.SHARED


def default_max_sparse_tokens(
    backend: Backend, read_fraction: float = 0.5, weight_format: str = FLOAT.name
) -> int:
    """The measured switch point of a backend.

    Every token has its own mask, and a step reads the masks' union, which on real text
    is nearly that of independent masks: 1 - (1 - f)^M. The default is the largest M, up
    to the backend's limit, for which this leaves enough unread.

    Args:
        backend: resolved.
        read_fraction: f, share of the linears' bytes that one token reads, in [0, 1].
        weight_format: the format of most of the sparse weights.
    """
    limit = _DEFAULTS[backend]
    if backend is Backend.TRITON:
        limit = 1 if weight_format in _ONE_TOKEN else limit
        most = _BREAK_EVENS.get(weight_format, _BREAK_EVEN)
        while limit and 1 - (1 - read_fraction) ** limit > most:
            limit -= 1
    return limit
