# SPDX-License-Identifier: Apache-2.0
"""``quantization_config`` of config.json or ``--hf-overrides``: schema and versions.

It has its own version numbers, because the settings of a served model change
independently of the artifact's contents.
"""

from collections.abc import Callable
from dataclasses import asdict, fields
from typing import Annotated, Any

from pydantic import AfterValidator, StrictFloat, StrictInt, StrictStr
from pydantic.dataclasses import dataclass

from vllm_rsparse.artifact.versions import known_version
from vllm_rsparse.envs import MAX_COUNT
from vllm_rsparse.errors import ArtifactError
from vllm_rsparse.formats.names import AS_STORED, HEAD_FORMATS, LOAD_TIME_FORMATS
from vllm_rsparse.validation import CONFIG, must, one_of, sha256, shown, validate

QUANT_METHOD = "rsparse"
CONFIG_VERSION = 2
WHERE = "quantization_config"
HOW_TO = (
    "Serve a directory written by `vllm-rsparse prepare MODEL OUTPUT --sparsity S"
    " --calibration-data FILE...`, or point a checkpoint at an artifact with"
    ' --quantization rsparse --hf-overrides \'{"rsparse": {"artifact":'
    ' "/absolute/path"}}\''
)


def _text(allowed: str = "be a string that is not empty") -> Any:
    return must(allowed, default=None, min_length=1)


def _names_its_method(base: dict[str, Any]) -> dict[str, Any]:
    if not isinstance(base.get("quant_method"), str):
        raise ValueError(
            "the quantization_config of a checkpoint has a quant_method, got"
            f" {shown(base)}"
        )
    return base


def _count(allowed: str) -> Any:
    return must(f"{allowed}, at most {MAX_COUNT}", default=None, ge=0, le=MAX_COUNT)


@dataclass(frozen=True, config=CONFIG)
class QuantizationSettingsV1:
    """Version 1."""

    quant_method: StrictStr | None = _text()
    format_version: StrictInt = must("be an integer", default=1)
    artifact: StrictStr | None = _text()
    artifact_sha256: StrictStr | None = sha256(default=None)
    sparsity: StrictFloat | None = must("be a number", default=None)
    max_sparse_tokens: StrictInt | None = _count("be an integer >= 0 (0 serves dense)")
    backend: StrictStr | None = _text()


Base = Annotated[dict[str, Any], AfterValidator(_names_its_method)]


@dataclass(frozen=True, config=CONFIG)
class QuantizationSettings:
    """Version 2, and what the package works with.

    Attributes:
        quant_method: "rsparse"; None if ``--quantization`` named the method.
        format_version: of this config.
        artifact: where the artifact is: a path inside the model directory, an absolute
            path, or a Hub repository.
        artifact_sha256: digest that the artifact's tensor file must have.
        sparsity: target that it was made for; informative only.
        max_sparse_tokens: largest step that takes the sparse route.
        backend: a backend by name, or "auto".
        dense_weights: "shared", "separate" or "auto": whether steps that are not
            sparse use the same copy of the weights or the base's own layers.
        weights: "as-stored", or a format that the weights of the artifact's linears are
            quantized to while they load.
        head: the same for the output layer.
        head_sparsity: of the output layer: 0 serves it dense, any other number must be
            what it was prepared for.
        weights_on_disk: the format in which the directory's own files hold the
            artifact's linears; None where they are the base's.
        base: the base checkpoint's own ``quantization_config``, None for floats.
    """

    quant_method: StrictStr | None = _text()
    format_version: StrictInt = must("be an integer", default=CONFIG_VERSION)
    artifact: StrictStr | None = _text()
    artifact_sha256: StrictStr | None = sha256(default=None)
    sparsity: StrictFloat | None = must("be a number", default=None)
    max_sparse_tokens: StrictInt | None = _count("be an integer >= 0 (0 serves dense)")
    backend: StrictStr | None = _text()
    dense_weights: StrictStr | None = _text()
    weights: StrictStr | None = one_of(AS_STORED, *LOAD_TIME_FORMATS, default=None)
    head: StrictStr | None = one_of(AS_STORED, *HEAD_FORMATS, default=None)
    head_sparsity: StrictFloat | None = must("lie in [0, 1)", default=None, ge=0, lt=1)
    weights_on_disk: StrictStr | None = one_of(*LOAD_TIME_FORMATS, default=None)
    base: Base | None = must(
        "be the quantization_config of the base checkpoint", default=None
    )

    def to_dict(self) -> dict[str, Any]:
        """The form in config.json: keys without a value are omitted."""
        return {key: value for key, value in asdict(self).items() if value is not None}


KEYS = tuple(field.name for field in fields(QuantizationSettings))


def _read_v1(raw: dict[str, Any], where: str) -> QuantizationSettings:
    old = validate(QuantizationSettingsV1, raw, where, ArtifactError)
    return QuantizationSettings(**asdict(old))


def _read_v2(raw: dict[str, Any], where: str) -> QuantizationSettings:
    return validate(QuantizationSettings, raw, where, ArtifactError)


_READERS: dict[int, Callable[[dict[str, Any], str], QuantizationSettings]] = {
    1: _read_v1,
    2: _read_v2,
}


def read_quantization(raw: Any, where: str = WHERE) -> QuantizationSettings:
    """Validate a ``quantization_config`` of any version; none given is the newest.

    Args:
        raw: the value, as JSON was parsed.
        where: shown in errors.

    Raises:
        ArtifactError: not an object, an unknown key, a wrong type or value, a version
            of a later release, or another quantization method.
    """
    if not isinstance(raw, dict):
        raise ArtifactError(f"{where} must be an object, got {shown(raw)}. {HOW_TO}")
    method = raw.get("quant_method")
    if method is not None and method != QUANT_METHOD:
        raise ArtifactError(
            f"{where}: quant_method is {shown(method)}, not {QUANT_METHOD!r}. {HOW_TO}"
        )
    version = raw.get("format_version", CONFIG_VERSION)
    return _READERS[known_version(version, _READERS, where, ArtifactError)](raw, where)
