# SPDX-License-Identifier: Apache-2.0
"""Both dictionaries of settings, their precedence, and when a checkpoint is ours."""

from types import SimpleNamespace

import pytest
from transformers import AutoConfig, LlamaConfig

from vllm_rsparse.errors import ArtifactError
from vllm_rsparse.serving.settings import Settings, claims

FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic"}
PLAIN = SimpleNamespace()
NAMES_ARTIFACT = SimpleNamespace(rsparse={"artifact": "/a"})


@pytest.mark.parametrize(
    ("config", "user_quant", "hf_config", "expected"),
    [
        (FP8, None, PLAIN, False),
        (FP8, "fp8", PLAIN, False),
        (FP8, None, None, False),  # older releases pass no config
        (FP8, "rsparse", PLAIN, True),
        (FP8, "rsparse", None, True),
        (FP8, None, NAMES_ARTIFACT, True),
        (FP8, "fp8", NAMES_ARTIFACT, False),
        ({"quant_method": "rsparse", "artifact": "a"}, None, PLAIN, False),
        # ModelOpt's older files name no method, nor do files without one.
        ({"producer": {"name": "modelopt"}, "quant_method": ""}, None, PLAIN, False),
        ({}, None, PLAIN, False),
    ],
)
def test_checkpoints_of_others_are_claimed_on_request_only(
    config, user_quant, hf_config, expected
):
    assert claims(config, user_quant, hf_config) is expected


@pytest.mark.parametrize("user_quant", [None, "rsparse"])
@pytest.mark.parametrize("method", [{}, {"quant_method": ""}])
def test_a_dictionary_that_lost_its_method_is_refused(user_quant, method):
    """``--hf-overrides`` replaced it; vLLM would serve a prepared model dense."""
    with pytest.raises(ArtifactError, match=r"replaces the whole.*\{\"rsparse\": \{"):
        claims({"max_sparse_tokens": 4, **method}, user_quant, PLAIN)


def test_another_method_in_place_of_a_prepared_directorys_is_refused(tmp_path):
    """``--hf-overrides`` with the base's own dictionary; vLLM would serve it dense."""
    config = LlamaConfig()
    config.quantization_config = {"quant_method": "rsparse", "base": FP8}
    config.save_pretrained(tmp_path)
    overridden = AutoConfig.from_pretrained(tmp_path)
    for user_quant in (None, "rsparse", "fp8"):
        with pytest.raises(
            ArtifactError, match=r"config\.json: was written by .*dense"
        ):
            claims(FP8, user_quant, overridden)
    config.quantization_config = FP8
    config.save_pretrained(tmp_path)
    assert not claims(FP8, None, AutoConfig.from_pretrained(tmp_path))


def test_the_checkpoints_own_dictionary_is_the_base():
    settings = Settings.of_quantization_config(FP8)
    assert settings.base == FP8
    assert settings.artifact is None


def test_overrides_are_named_as_such():
    settings = Settings.of_overrides(SimpleNamespace(rsparse={"backend": "fast"}))
    assert settings.route.backend_name == "rsparse.backend"
    assert settings.artifact is None


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("/path", r"rsparse must be an object of settings, got '/path'"),
        ({"artefact": "/a"}, r"rsparse: unknown key 'artefact'"),
        ({"max_sparse_tokens": -1}, r"rsparse: max_sparse_tokens must be an integer"),
        ({"base": FP8}, r"rsparse\.base is not a setting"),
    ],
)
def test_bad_overrides_are_named(value, message):
    with pytest.raises(ValueError, match=message):
        Settings.of_overrides(SimpleNamespace(rsparse=value))
