# SPDX-License-Identifier: Apache-2.0
"""Fixtures shared by all tests: the reference model, artifacts with known content."""

import hashlib
import importlib.util
import json
import logging
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from vllm_rsparse.artifact.tensors import JSON_NAME, TENSORS_NAME

from .processes import (  # noqa: F401
    pytest_collection_modifyitems,
    pytest_xdist_make_scheduler,
)

# Without a GPU the kernels run in Triton's interpreter. Triton reads this when it is
# first imported, and vLLM imports it: it must be set before any test module is.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# A shell that runs the suite in the background ignores SIGINT, children inherit that,
# and the tests of Ctrl-C would wait for ever. A handler here is the default there.
signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def _logs_reach_caplog(monkeypatch: pytest.MonkeyPatch) -> None:
    """Undo between tests what registering the plug-in does to our logger.

    It hangs it below vLLM's, which passes nothing on to the root, where pytest listens.
    """
    monkeypatch.setattr(logging.getLogger("vllm_rsparse"), "parent", logging.root)


@pytest.fixture(scope="session")
def repository() -> Path:
    """The checkout."""
    return ROOT


@pytest.fixture(scope="session")
def pyllama() -> Path:
    """The bundled reference model: Llama, 4 layers, hidden 384, 6 heads, 2 kv heads."""
    return ROOT / "tests" / "assets" / "pyllama-8m"


@pytest.fixture(scope="session")
def tiny_llama(pyllama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights with pyllama's depth and tokenizer, a hundredth of its work.

    For tests of equality. What a model loses is tested on the trained one.
    """
    directory = tmp_path_factory.mktemp("models") / "tiny-llama"
    directory.mkdir()
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (directory / file).write_bytes((pyllama / file).read_bytes())
    config = json.loads((pyllama / "config.json").read_text())
    config |= {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 64,
    }
    (directory / "config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(0)

    def randn(n: int, k: int) -> torch.Tensor:
        return (torch.randn(n, k, generator=generator) / k**0.5).bfloat16()

    tensors = {
        "model.embed_tokens.weight": randn(4096, 128),
        "model.norm.weight": torch.ones(128).bfloat16(),
    }
    shapes = {"self_attn.q_proj": (128, 128), "self_attn.o_proj": (128, 128)}
    shapes |= dict.fromkeys(("self_attn.k_proj", "self_attn.v_proj"), (64, 128))
    shapes |= dict.fromkeys(("mlp.gate_proj", "mlp.up_proj"), (256, 128))
    shapes["mlp.down_proj"] = (128, 256)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        for kind, shape in shapes.items():
            tensors[f"{prefix}.{kind}.weight"] = randn(*shape)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}.{norm}.weight"] = torch.ones(128).bfloat16()
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    return directory


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


# What the versions of the format call the constant, in the entry and in the tensors.
CORRECTION = {1: "bias", 2: "correction"}


def write_files(
    directory: Path,
    tensors: dict[str, dict[str, torch.Tensor]],
    shapes: dict[str, tuple[int, int]],
    dtype: str,
    version: int,
    more: dict[str, torch.Tensor],
    **values: Any,
) -> str:
    """Write both files of an artifact as docs/format.md has them; returns the digest.

    Args:
        directory: where to.
        tensors: name -> {"thresholds", "u", "v", "correction"}.
        shapes: name -> (N, K).
        dtype: of the factors, and of the base's weights.
        version: of the format.
        more: other tensors, by their names in the file.
        values: what ``rsparse.json`` says besides, or instead.
    """
    directory.mkdir(parents=True, exist_ok=True)
    entries = {}
    for name, mine in tensors.items():
        entries[name] = {
            "shape": list(shapes[name]),
            "sparsity": 0.5,
            "rho": 0.95,
            "rank": mine["v"].shape[0] if "v" in mine else 0,
            "kept_fraction": 0.5,
            CORRECTION[version]: "correction" in mine,
        }
        if mine["thresholds"].dim() == 2:
            entries[name]["full_fraction"] = 0.1
    stored = {
        f"{name}.{CORRECTION[version] if key == 'correction' else key}": tensor
        for name, mine in tensors.items()
        for key, tensor in mine.items()
    }
    save_file(stored | more, directory / TENSORS_NAME)
    digest = hashlib.sha256((directory / TENSORS_NAME).read_bytes()).hexdigest()
    document: dict[str, Any] = {
        "format_version": version,
        "sparsity": 0.5,
        "linears": entries,
        "dtype": dtype,
        "tensors_sha256": digest,
    }
    if version > 1:
        document["base"] = {"format": "float", "dtype": dtype}
    (directory / JSON_NAME).write_text(json.dumps(document | values))
    return digest


@pytest.fixture(scope="session")
def write_artifact() -> Callable[..., dict[str, dict[str, torch.Tensor]]]:
    """Write an artifact with random tensors, independently of ``prepare``.

    Called with the directory and a dict of linears, name -> (N, K, rank, has a
    correction), and how many planes the weights have; returns the tensors it wrote,
    name -> {"thresholds", "u", "v", "correction"}.
    """

    def write(
        directory: Path,
        linears: dict[str, tuple[int, int, int, bool]],
        dtype: torch.dtype = torch.float32,
        version: int = 2,
        more: dict[str, torch.Tensor] | None = None,
        planes: int = 1,
        **values: Any,
    ) -> dict[str, dict[str, torch.Tensor]]:
        tensors: dict[str, dict[str, torch.Tensor]] = {}
        for name, (n, k, rank, corrected) in linears.items():
            mine = {"thresholds": torch.rand(k)}
            if planes == 2:
                factors = torch.tensor([1.0, 2.0])
                mine["thresholds"] = torch.outer(factors, mine["thresholds"])
            if rank:
                mine["u"] = torch.randn(n, rank).to(dtype)
                mine["v"] = (torch.randn(rank, k) / k**0.5).to(dtype)
            if corrected:
                mine["correction"] = torch.randn(n)
            tensors[name] = mine
        shapes = {name: (n, k) for name, (n, k, _, _) in linears.items()}
        word = str(dtype).removeprefix("torch.")
        write_files(directory, tensors, shapes, word, version, more or {}, **values)
        return tensors

    return write


@pytest.fixture
def write_prepared(pyllama: Path, tmp_path: Path) -> Callable[..., Path]:
    """Write a prepared directory of the reference model, independently of ``prepare``.

    Called with its name and with what gives the tensors of a linear from its name, N
    and K: {"thresholds"}, and maybe {"u", "v"} and {"correction"}.
    """

    def write(
        name: str,
        tensors_of: Callable[[str, int, int], dict[str, torch.Tensor]],
        version: int = 2,
    ) -> Path:
        directory = tmp_path / name
        directory.mkdir()
        for file in pyllama.iterdir():
            if file.suffix in (".safetensors", ".json") and file.name != "config.json":
                (directory / file.name).symlink_to(file)
        shapes, tensors = {}, {}
        for weight, value in load_file(pyllama / "model.safetensors").items():
            if not weight.endswith("_proj.weight"):
                continue
            linear = weight.removesuffix(".weight")
            n, k = shapes[linear] = tuple(value.shape)
            tensors[linear] = tensors_of(linear, n, k)
        digest = write_files(
            directory / "rsparse", tensors, shapes, "float32", version, {}
        )
        config = json.loads((pyllama / "config.json").read_text())
        config["quantization_config"] = {
            "quant_method": "rsparse",
            "format_version": version,
            "artifact": "rsparse",
            "artifact_sha256": digest,
        }
        (directory / "config.json").write_text(json.dumps(config))
        return directory

    return write


@pytest.fixture
def held_out(tmp_path: Path) -> Path:
    """A text file of some windows, to measure losses on."""
    path = tmp_path / "held-out.txt"
    path.write_text(Path(json.__file__).read_text()[:2500])
    return path


@pytest.fixture
def edit_json() -> Callable[[Path, Callable[[dict[str, Any]], None]], None]:
    """Change a JSON file in place through a function that edits the parsed object."""

    def edit(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
        raw = json.loads(path.read_text())
        change(raw)
        path.write_text(json.dumps(raw))

    return edit


TORCHVISION = (
    "torchvision",
    "torchvision/io",
    "torchvision/transforms",
    "torchvision/transforms/functional",
    "torchvision/transforms/v2",
    "torchvision/transforms/v2/functional",
)
# A module that has every name, each a class that has every attribute.
ANY_NAME = """
__version__ = "0.28.0"


class Anything(type):
    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return name


def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return Anything(name, (), {})
"""


@pytest.fixture(scope="session")
def torchvision_stand_in(tmp_path_factory: pytest.TempPathFactory) -> Path | None:
    """A folder to import torchvision from where it is not installed; else None.

    PyPI has no build of it for a CPU build of PyTorch. vLLM's classes of models with
    vision import names from it for annotations; images are prepared by Pillow.
    """
    if importlib.util.find_spec("torchvision"):
        return None
    root = tmp_path_factory.mktemp("torchvision")
    for module in TORCHVISION:
        folder = root / module
        folder.mkdir()
        (folder / "__init__.py").write_text(ANY_NAME)
    return root
