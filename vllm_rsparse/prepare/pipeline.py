# SPDX-License-Identifier: Apache-2.0
"""``prepare`` from end to end."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import torch

from vllm_rsparse.arguments import writing
from vllm_rsparse.artifact.schema import ArtifactInfo, BaseWeights
from vllm_rsparse.errors import CheckpointError, PrepareError
from vllm_rsparse.formats.checkpoints.layout import main_format
from vllm_rsparse.formats.names import ONLY_AS
from vllm_rsparse.formats.plane_bits import GROUPS, group_of, plane_bits
from vllm_rsparse.formats.registry import load_time_format
from vllm_rsparse.model.checkpoint import Checkpoint
from vllm_rsparse.model.checkpoint_files import resolve_model
from vllm_rsparse.model.device import choose_device
from vllm_rsparse.model.linears import Linear, find_linears
from vllm_rsparse.model.streaming import StreamedModel
from vllm_rsparse.prepare.calibration.held_out import HeldOut
from vllm_rsparse.prepare.calibration.layers import Job, calibrate_layers
from vllm_rsparse.prepare.directories import Directories
from vllm_rsparse.prepare.estimate import (
    TRIALS_FOR_PRICE,
    TRIED_FOR_PRICE,
    warn_if_long,
)
from vllm_rsparse.prepare.options import IN_PLANES, PrepareOptions
from vllm_rsparse.prepare.recipe.files import load_recipe, recipe_json
from vllm_rsparse.prepare.recipe.recipes import RECIPES, Recipe
from vllm_rsparse.prepare.run import Run, dense_prefix
from vllm_rsparse.prepare.search.allocators import allocator_of, takes_planes
from vllm_rsparse.prepare.search.planning import Planner
from vllm_rsparse.prepare.search.price import find_priced
from vllm_rsparse.prepare.store.identity import run_identity
from vllm_rsparse.prepare.store.output import (
    StagedOutput,
    check_output,
    check_recipe_file,
    check_space,
)
from vllm_rsparse.prepare.store.quantized_copy import QuantizedCopy
from vllm_rsparse.prepare.store.run_store import RunStore
from vllm_rsparse.prepare.text import choose_text
from vllm_rsparse.texts.documents import read_sources


def prepare(options: PrepareOptions) -> ArtifactInfo:
    """``prepare_all`` of options that name one directory."""
    (info,) = prepare_all(options)
    return info


def prepare_all(options: PrepareOptions) -> list[ArtifactInfo]:
    """Write prepared directories for a dense model, one for each sparsity.

    None exists before all are complete.

    Args:
        options: validated settings.

    Returns:
        What was written to each ``rsparse.json``, in the order of ``options.outputs``.

    Raises:
        PrepareError: bad settings, unusable output directory, or a full disk.
        SettingError: the recipe's file cannot be written.
        CheckpointError: bad input, unsupported model.
        NotFiniteError: NaN or infinity in weights or activations.
    """
    # Everything that can be checked now is checked before a download and the tokenizer.
    for output in options.outputs:
        check_output(output, options.overwrite)
    if options.save_recipe is not None:
        check_recipe_file(options.save_recipe, options.output)
    recipe = _recipe(options)
    texts = read_sources(options.calibration_data, "--calibration-data")
    device = choose_device(options.device)
    checkpoint = Checkpoint(resolve_model(options.model, options.revision))
    linears, stored_dtype = find_linears(checkpoint)
    dtype = _compute_dtype(options.dtype, device, stored_dtype)
    staged = [
        StagedOutput(
            output,
            checkpoint.directory,
            options.overwrite,
            links=not options.copy_weights,
        )
        for output in options.outputs
    ]
    base = _base_weights(checkpoint, linears, stored_dtype)
    load_time = load_time_format(options.weights, "--weights")
    if load_time is not None:
        load_time.check_base(base.format, str(checkpoint.directory))
    else:
        _refuse_unread(checkpoint, linears)
    quantized_copy = None
    if options.copy_weights:
        if load_time is not None:
            quantized_copy = QuantizedCopy(checkpoint, linears, load_time, device)
        size = None if quantized_copy is None else quantized_copy.nbytes
        check_space(options.output, checkpoint, len(staged), size)
    head_load_time = load_time_format(options.head, "--head")
    model = StreamedModel(checkpoint, device, dtype, load_time, head_load_time)
    if head_load_time is not None or options.head_sparsity > 0:
        model.check_head()
    source = choose_text(options, texts, model, getattr(torch, stored_dtype))
    output = options.output.absolute()
    store = RunStore(
        output.with_name(f"{output.name}.search"),
        run_identity(recipe, options, model, source.identity),
    )
    sparsities = _sparsities(options, linears)
    if device.type == "cpu":
        targets = searches = len(sparsities)
        if options.max_kl is not None:
            targets, searches = TRIED_FOR_PRICE, TRIALS_FOR_PRICE
        tokens = source.calibration_tokens
        warn_if_long(recipe, linears, tokens, dtype, targets, searches)
    with ExitStack() as stack:
        for one in staged:
            stack.enter_context(one)
        stack.enter_context(store)
        with _hint_when_out_of_memory():
            text = source.windows(store, [one.artifact for one in staged])
            on_sparse = recipe.activations == "sparse"
            prefix = dense_prefix(text.windows) if on_sparse else 0
            run = Run(
                model,
                tuple(linears),
                text.windows,
                prefix,
                options.seed,
                store,
                head_sparsity=options.head_sparsity,
            )
            planner = Planner(run, recipe)
            priced = None
            if options.max_kl is not None and text.held_out is not None:
                held_out = HeldOut(run, text.held_out)
                priced = find_priced(run, planner, held_out, options.max_kl)
                sparsities = [priced.sparsity]
            jobs = [
                Job(run, sparsity, planner.plan(sparsity), one.tensors)
                for sparsity, one in zip(sparsities, staged, strict=True)
            ]
            calibrated = calibrate_layers(jobs, getattr(torch, stored_dtype))
        directories = Directories(
            options, recipe, model, linears, base, text, quantized_copy, priced
        )
        infos = [
            directories.write(one, job, found)
            for one, job, found in zip(staged, jobs, calibrated, strict=True)
        ]
        for one in staged:
            one.check()  # again: hours may have passed
        for one in staged:
            one.commit()
    if options.save_recipe is not None:
        text_of_recipe = recipe_json(jobs[0].planned.recipe)
        with writing(f"--save-recipe {options.save_recipe}"):
            options.save_recipe.write_text(text_of_recipe, encoding="utf-8")
    return infos


def _recipe(options: PrepareOptions) -> Recipe:
    """The recipe with ``--rho``; refused if its choices are not compatible."""
    recipe = load_recipe(options.recipe)
    if options.rho is not None:
        recipe = replace(recipe, rho=options.rho)
    allocator = allocator_of(recipe)
    if options.max_kl is not None and (allocator.long or recipe.linears is not None):
        reason = "fixes the plan of every linear"
        if recipe.linears is None:
            reason = "searches for long at every sparsity"
        raise PrepareError(
            f"--max-kl {options.max_kl:g}: recipe {recipe.name!r} {reason}; give"
            " --sparsity, or use --recipe best, greedy, uniform, teal or wina"
        )
    if options.weights == IN_PLANES and not takes_planes(recipe):
        raise PrepareError(
            f"recipe {recipe.name!r} does not allocate bits: with --weights"
            f" {IN_PLANES} use one of"
            f" {', '.join(name for name, one in RECIPES.items() if takes_planes(one))}"
        )
    return recipe


def _sparsities(options: PrepareOptions, linears: Sequence[Linear]) -> Sequence[float]:
    """The fractions of the linears' bits that tokens shall not read; none if sought.

    Raises:
        CheckpointError: the weights are to be read in planes, and a linear cannot be.
    """
    if options.weights != IN_PLANES:
        return options.sparsities
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
    if options.bits is None:
        return []
    return [max(0.0, 1 - options.bits * elements / stored)]


def _base_weights(
    checkpoint: Checkpoint, linears: Iterable[Linear], dtype: str
) -> BaseWeights:
    names = [linear.name for linear in linears]
    name, group = main_format(map(checkpoint.linear_format, names))
    zeros = any(map(checkpoint.linear_zeros, names))
    return BaseWeights(name, dtype, group, zeros)


def _refuse_unread(checkpoint: Checkpoint, linears: Iterable[Linear]) -> None:
    """Refuse formats that no kernel reads as the checkpoint stores them."""
    for linear in linears:
        name, _ = checkpoint.linear_format(linear.name)
        if name in ONLY_AS:
            raise PrepareError(
                f"{checkpoint.directory}: {linear.name} is stored in {name}, which is"
                f" served as {ONLY_AS[name]}: use --weights {ONLY_AS[name]} --bits B"
                " instead of --sparsity (4.2 bits read as much as INT4 does)"
            )


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
