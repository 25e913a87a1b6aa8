# SPDX-License-Identifier: Apache-2.0
"""The two dictionaries of settings in a model's config.

``quantization_config`` is written by ``prepare``, or replaced as a whole by
``--hf-overrides``. ``rsparse``, set by ``--hf-overrides``, overrides it key by key, and
is the only one if ``quantization_config`` is the base checkpoint's own.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_rsparse.artifact.quantization import (
    HOW_TO,
    KEYS,
    QUANT_METHOD,
    read_quantization,
)
from vllm_rsparse.artifact.schema import ArtifactInfo
from vllm_rsparse.errors import ArtifactError, SettingError
from vllm_rsparse.formats.names import AS_STORED, DENSE_HEAD_FORMATS
from vllm_rsparse.formats.registry import format_of_name, load_time_format
from vllm_rsparse.serving.route import RouteRequest
from vllm_rsparse.validation import read_json

logger = logging.getLogger(__name__)

# Their names.
IN_QUANTIZATION_CONFIG = "quantization_config"
IN_OVERRIDES = "rsparse"


@dataclass(frozen=True)
class Settings:
    """The settings in one of the dictionaries; None where it has none.

    Attributes:
        where: the dictionary's name in messages.
        artifact: where the artifact is, see ``locate_artifact``.
        artifact_sha256: digest that its tensor file must have.
        max_sparse_tokens: switch point of the route; 0 serves dense.
        backend: ``auto`` or a backend by name.
        dense_weights: ``auto``, ``shared`` or ``separate``.
        base: the checkpoint's own ``quantization_config``.
        weights: ``as-stored``, or what weights are quantized to while they load.
        head: the same for the output layer.
        head_sparsity: of the output layer; 0: it is dense.
        weights_on_disk: format of the linears in the directory's files; None: the
            base's own.
    """

    where: str
    artifact: str | None = None
    artifact_sha256: str | None = None
    max_sparse_tokens: int | None = None
    backend: str | None = None
    dense_weights: str | None = None
    base: Mapping[str, Any] | None = None
    weights: str | None = None
    head: str | None = None
    head_sparsity: float | None = None
    weights_on_disk: str | None = None

    @classmethod
    def of_quantization_config(cls, config: dict[str, Any]) -> "Settings":
        """Read ``quantization_config``, ours or that of a quantized checkpoint.

        Raises:
            ArtifactError: unknown key, wrong type or value, unsupported version.
        """
        method = config.get("quant_method")
        if method is not None and method != QUANT_METHOD:
            return cls(IN_QUANTIZATION_CONFIG, base=config)
        return cls._read(config, IN_QUANTIZATION_CONFIG)

    @classmethod
    def of_overrides(cls, hf_config: Any) -> "Settings":
        """Read the key ``rsparse`` of a model's config; empty if there is none.

        Raises:
            ArtifactError: unknown key, wrong type or value.
        """
        config = getattr(hf_config, IN_OVERRIDES, None)
        if config is None:
            return cls(IN_OVERRIDES)
        if not isinstance(config, dict):
            raise ArtifactError(
                f"{IN_OVERRIDES} must be an object of settings, got {config!r}."
                f" {HOW_TO}"
            )
        for key in ("base", "weights_on_disk"):
            if key in config:
                raise ArtifactError(
                    f"{IN_OVERRIDES}.{key} is not a setting: how the checkpoint is"
                    " quantized is read from its own quantization_config; leave it out"
                )
        return cls._read(config, IN_OVERRIDES)

    @classmethod
    def _read(cls, config: dict[str, Any], where: str) -> "Settings":
        read = read_quantization(config, where)
        return cls(
            where,
            read.artifact,
            read.artifact_sha256,
            read.max_sparse_tokens,
            read.backend,
            read.dense_weights,
            read.base,
            read.weights,
            read.head,
            read.head_sparsity,
            read.weights_on_disk,
        )

    @property
    def route(self) -> RouteRequest:
        """The route that it requests."""
        return RouteRequest.of_config(
            self.where, self.backend, self.max_sparse_tokens, self.dense_weights
        )


def format_of(weights: str, info: ArtifactInfo) -> str:
    """The format that most of an artifact's linears have in the engine.

    Args:
        weights: ``as-stored`` or the name of a load-time format.
        info: of the artifact.
    """
    return info.base.format if weights == AS_STORED else weights


def served_weights(
    dictionaries: Sequence[Settings], info: ArtifactInfo, model: str
) -> str:
    """What the weights of an artifact's linears are quantized to while they load.

    Args:
        dictionaries: the first that has a value wins; none: what was prepared.
        info: of the artifact.
        model: the served model, for messages.

    Returns:
        ``as-stored`` or the name of a load-time format.

    Raises:
        SettingError: the format cannot be made from the checkpoint's weights.
    """
    chosen, where = info.weights, "the artifact"
    for settings in dictionaries:
        if settings.weights is not None:
            chosen, where = settings.weights, f"{settings.where}.weights"
            break
    load_time = load_time_format(chosen, where)
    on_disk = next((s.weights_on_disk for s in dictionaries if s.weights_on_disk), None)
    if on_disk is not None and on_disk != chosen:
        raise SettingError(
            f"{where} is {chosen}, but {model} holds its linears in {on_disk} and"
            " nothing else (prepare --copy-weights); prepare the base model again"
            " without --copy-weights to serve it otherwise"
        )
    if load_time is not None:
        load_time.check_base(info.base.format, model)
    wanted = format_of_name(info.base.format if load_time is None else chosen)
    if wanted.planes != format_of_name(info.served_format).planes:
        raise SettingError(
            f"{where} is {chosen}, but the artifact's thresholds are for weights"
            f" {info.weights}: one of them is read in planes and the other is not;"
            f" prepare the model with --weights {chosen}"
        )
    if chosen != info.weights:
        logger.warning(
            "rsparse: the artifact was calibrated on weights %s, and %s serves them"
            " %s; prepare the model with --weights %s to calibrate on what is served",
            info.weights,
            where,
            chosen,
            chosen,
        )
    return chosen


def served_head(dictionaries: Sequence[Settings], info: ArtifactInfo) -> str:
    """What the output layer is quantized to; arguments as for ``served_weights``."""
    chosen = (settings.head for settings in dictionaries)
    return next((head for head in chosen if head is not None), info.head)


def served_head_sparsity(dictionaries: Sequence[Settings], info: ArtifactInfo) -> float:
    """The output layer's sparsity; arguments as for ``served_weights``.

    Returns:
        What it was prepared for, or 0: it is dense.

    Raises:
        SettingError: it was prepared for another one, or the format that the output
            layer is served in is dense at every step.
    """
    prepared = info.head_sparsity
    head = served_head(dictionaries, info)
    if prepared and head in DENSE_HEAD_FORMATS:
        given = [settings.head_sparsity for settings in dictionaries]
        if next((one for one in given if one is not None), prepared):
            raise SettingError(
                f"head is {head}, which is dense at every step, but the artifact has a"
                f" sparse output layer ({prepared:g}); set head_sparsity to 0, or head"
                " to another format"
            )
    for settings in dictionaries:
        chosen = settings.head_sparsity
        if chosen is None:
            continue
        if chosen not in (0, prepared):
            allowed = f"{prepared} or 0 (dense)" if prepared else "0 (dense)"
            raise SettingError(
                f"{settings.where}.head_sparsity is {chosen}; the artifact allows"
                f" {allowed}: prepare the model with --head-sparsity {chosen}"
            )
        return chosen
    return prepared


def claims(
    quantization_config: Mapping[str, Any], user_quant: str | None, hf_config: Any
) -> bool:
    """Whether rsparse serves a checkpoint that another method quantized.

    vLLM calls this for every quantized model, whatever its method.

    Args:
        quantization_config: of the model's config.
        user_quant: the value of ``--quantization``.
        hf_config: the model's config.

    Raises:
        ArtifactError: the dictionary has our keys and no method, or it replaces that of
            a prepared directory; vLLM would serve the model dense.
    """
    method = quantization_config.get("quant_method")
    if not method:
        mine = set(quantization_config) - {"quant_method"}
        if user_quant == QUANT_METHOD or (mine and mine <= set(KEYS)):
            raise ArtifactError(
                f"quantization_config is {dict(quantization_config)}, without"
                " quant_method: --hf-overrides replaces the whole dictionary that"
                " config.json has. To change a setting of a prepared model, override"
                ' the key rsparse: --hf-overrides \'{"rsparse": {"max_sparse_tokens":'
                " 4}}'"
            )
        return False
    if method == QUANT_METHOD:
        return False  # vLLM recognises this itself
    _refuse_replaced(quantization_config, hf_config)
    asked = getattr(hf_config, IN_OVERRIDES, None) is not None
    return user_quant == QUANT_METHOD or (user_quant is None and asked)


def _refuse_replaced(quantization_config: Mapping[str, Any], hf_config: Any) -> None:
    """Refuse another method's dictionary for a directory that was prepared."""
    # vLLM and transformers note where a config is from.
    directory = getattr(hf_config, "_name_or_path", "")
    file = Path(directory) / "config.json"
    if not directory or not file.is_file():
        return
    config = read_json(file, ArtifactError, "; prepare the model again")
    written = config.get("quantization_config")
    if not isinstance(written, dict) or written.get("quant_method") != QUANT_METHOD:
        return
    raise ArtifactError(
        f"{file}: was written by `vllm-rsparse prepare`, but --hf-overrides replaces"
        f" its quantization_config by {dict(quantization_config)}; the model would be"
        " served dense. Leave that key out: to change a setting, override the key"
        " rsparse; to serve dense, set its max_sparse_tokens to 0, or serve the base"
        " model"
    )
