# SPDX-License-Identifier: Apache-2.0
"""``prepare`` from end to end."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from importlib.metadata import version

import torch

from vllm_rsparse import __version__
from vllm_rsparse.artifact.quantization import QUANT_METHOD, QuantizationSettings
from vllm_rsparse.artifact.reads import TOKEN_READS
from vllm_rsparse.artifact.schema import ArtifactInfo, BaseWeights
from vllm_rsparse.artifact.tensors import (
    ARTIFACT_DIR,
    JSON_NAME,
    TENSORS_NAME,
    Artifact,
    file_sha256,
)
from vllm_rsparse.artifact.versions import write_info
from vllm_rsparse.errors import CheckpointError, PrepareError
from vllm_rsparse.formats.checkpoints.layout import main_format
from vllm_rsparse.formats.names import AS_STORED
from vllm_rsparse.formats.plane_bits import GROUPS, group_of, plane_bits
from vllm_rsparse.formats.registry import load_time_format
from vllm_rsparse.model.checkpoint import Checkpoint, resolve_model
from vllm_rsparse.model.device import choose_device
from vllm_rsparse.model.language_model import LanguageModel
from vllm_rsparse.model.linears import Linear, find_linears
from vllm_rsparse.model.quantized import OLD_KEY, base_quantization
from vllm_rsparse.model.reads import token_reads
from vllm_rsparse.model.streaming import StreamedModel
from vllm_rsparse.prepare.calibration.layers import calibrate_layers
from vllm_rsparse.prepare.options import PrepareOptions
from vllm_rsparse.prepare.recipe.files import load_recipe, recipe_json
from vllm_rsparse.prepare.recipe.recipes import RECIPES, Recipe
from vllm_rsparse.prepare.run import Run, dense_prefix
from vllm_rsparse.prepare.search.allocators import allocator_of, takes_planes
from vllm_rsparse.prepare.search.planning import plan_linears
from vllm_rsparse.prepare.store.identity import run_identity
from vllm_rsparse.prepare.store.output import (
    StagedOutput,
    check_output,
    check_recipe_file,
    check_space,
    write_text,
)
from vllm_rsparse.prepare.store.run_store import RunStore
from vllm_rsparse.prepare.text import choose_text
from vllm_rsparse.texts.documents import read_sources


def prepare(options: PrepareOptions) -> ArtifactInfo:
    """Write a prepared directory for a dense model.

    Args:
        options: validated settings.

    Returns:
        What was written to ``rsparse.json``.

    Raises:
        PrepareError: bad settings, unusable output directory.
        CheckpointError: bad input, unsupported model.
        NotFiniteError: NaN or infinity in weights or activations.
        OSError: the disk is full or a file cannot be written.
    """
    # Everything that can be checked now is checked before a download and the tokenizer.
    check_output(options.output, options.overwrite)
    if options.save_recipe is not None:
        check_recipe_file(options.save_recipe, options.output)
    recipe = _recipe(options)
    texts = read_sources(options.calibration_data, "--calibration-data")
    device = choose_device(options.device)
    checkpoint = Checkpoint(resolve_model(options.model, options.revision))
    linears, stored_dtype = find_linears(checkpoint)
    dtype = _compute_dtype(options.dtype, device, stored_dtype)
    staged = StagedOutput(options.output, checkpoint.directory, options.overwrite)
    if options.copy_weights:
        check_space(options.output, checkpoint)
    base = _base_weights(checkpoint, linears, stored_dtype)
    load_time = load_time_format(options.weights, "--weights")
    if load_time is not None:
        load_time.check_base(base.format, str(checkpoint.directory))
    model = StreamedModel(checkpoint, device, dtype, load_time)
    if options.head != AS_STORED:
        model.require_plain_head()
    source = choose_text(options, texts, model, getattr(torch, stored_dtype))
    output = options.output.absolute()
    store = RunStore(
        output.with_name(f"{output.name}.search"),
        run_identity(recipe, options, model, source.identity),
    )
    sparsity = _sparsity(options, linears)
    with staged, store:
        with _hint_when_out_of_memory():
            text = source.windows(store, staged.artifact)
            on_sparse = recipe.activations == "sparse"
            prefix = dense_prefix(text.windows) if on_sparse else 0
            run = Run(model, tuple(linears), text.windows, prefix, options.seed, store)
            planned = plan_linears(run, recipe, sparsity)
            calibrated = calibrate_layers(
                run,
                planned,
                staged.artifact / TENSORS_NAME,
                getattr(torch, stored_dtype),
            )
        digest = file_sha256(staged.artifact / TENSORS_NAME)
        info = ArtifactInfo(
            sparsity=sparsity,
            linears=calibrated.entries,
            dtype=stored_dtype,
            tensors_sha256=digest,
            base=base,
            weights=options.weights,
            head=options.head,
            provenance={
                "vllm_rsparse": __version__,
                "torch": torch.__version__,
                "transformers": version("transformers"),
                "base_model": options.model,
                "base_directory": str(checkpoint.directory),
                "recipe": {
                    "name": recipe.name,
                    "sparsity": sparsity,
                    "rho": recipe.rho,
                },
                "method": {
                    "score": recipe.score,
                    "allocation": recipe.allocation,
                    "activations": recipe.activations,
                    "correction": planned.corrected,
                    "factors": recipe.factors,
                    "trials": dict(planned.trials),
                },
                "calibration": text.provenance
                | {"device": device.type, "dtype": _name(dtype)},
                TOKEN_READS: asdict(token_reads(LanguageModel(checkpoint), linears)),
                "svd": {"largest_residual": calibrated.residuals},
            },
        )
        write_text(staged.artifact / JSON_NAME, write_info(info))
        # Read back as the engine will: our own errors show here and not while serving.
        Artifact(staged.artifact)
        staged.add_base_files(checkpoint, options.copy_weights)
        quantization = QuantizationSettings(
            quant_method=QUANT_METHOD,
            artifact=ARTIFACT_DIR,
            artifact_sha256=digest,
            sparsity=sparsity,
            weights=None if load_time is None else load_time.name,
            head=None if options.head == AS_STORED else options.head,
            base=base_quantization(checkpoint.config),
        )
        # The older name of the key: vLLM would read it as well.
        config = {k: v for k, v in checkpoint.config.items() if k != OLD_KEY}
        staged.write_config(config | {"quantization_config": quantization.to_dict()})
        staged.commit()
    if options.save_recipe is not None:
        text_of_recipe = recipe_json(planned.recipe)
        options.save_recipe.write_text(text_of_recipe, encoding="utf-8")
    return info


def _recipe(options: PrepareOptions) -> Recipe:
    """The recipe with ``--rho``; refused if its choices are not compatible."""
    recipe = load_recipe(options.recipe)
    if options.rho is not None:
        recipe = replace(recipe, rho=options.rho)
    allocator_of(recipe)
    if options.bits is not None and not takes_planes(recipe):
        raise PrepareError(
            f"recipe {recipe.name!r} does not allocate bits: with --bits use one of"
            f" {', '.join(name for name, one in RECIPES.items() if takes_planes(one))}"
        )
    return recipe


def _sparsity(options: PrepareOptions, linears: Sequence[Linear]) -> float:
    """The fraction of the linears' bits that tokens shall not read.

    Raises:
        CheckpointError: the weights are to be read in planes, and a linear cannot be.
    """
    if options.sparsity is not None:
        return options.sparsity
    assert options.bits is not None  # as the options check
    stored = elements = 0.0
    for linear in linears:
        n, k = linear.shape
        if group_of(k) is None or n % 8:
            raise CheckpointError(
                f"{linear.name} is [{n}, {k}]: --weights {options.weights} needs a"
                f" multiple of {GROUPS[-1]} input channels, and of 8 output channels;"
                " use --weights fp8"
            )
        stored += n * k * sum(plane_bits(k))
        elements += n * k
    return max(0.0, 1 - options.bits * elements / stored)


def _base_weights(
    checkpoint: Checkpoint, linears: Iterable[Linear], dtype: str
) -> BaseWeights:
    formats = (checkpoint.linear_format(linear.name) for linear in linears)
    name, group = main_format(formats)
    return BaseWeights(name, dtype, group)


@contextmanager
def _hint_when_out_of_memory() -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise PrepareError(
            f"out of device memory ({error}); lower --calibration-samples or"
            " --calibration-tokens, or use --device cpu"
        ) from error


def _compute_dtype(name: str, device: torch.device, stored: str) -> torch.dtype:
    if name == "auto":
        name = "float32" if device.type == "cpu" else stored
    return getattr(torch, name)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
