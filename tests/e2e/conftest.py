# SPDX-License-Identifier: Apache-2.0
"""A prepared model, servers of it, and the same model in plain PyTorch.

The plain model has the formula written out, apart from the package.
"""

import json
import os
import subprocess
import sys
import sysconfig
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from vllm_rsparse.testing.families import PARTS
from vllm_rsparse.testing.server import ServerProcess

from .offline import OfflineEngines

BIN = Path(sys.executable).parent
CHAT_TEMPLATE = "{% for m in messages %}# {{ m.content }}\n{% endfor %}def "


class SparseLinear(torch.nn.Module):
    """y = W s(x) + U V (x - s(x)) + correction, dense above ``limit`` tokens.

    With two rows of thresholds, ``first`` is the first plane of W and s_2 the second
    row's: y = first s_1(x) + (W - first) s_2(x) + ...
    """

    def __init__(self, weight, bias, name, tensors, limit, first=None):
        super().__init__()
        self.first = first
        self.weight, self.bias, self.limit = weight, bias, limit
        keys = tensors.keys()
        self.threshold = tensors.get_tensor(f"{name}.thresholds")
        if f"{name}.u" in keys:
            u = tensors.get_tensor(f"{name}.u").float()
            self.low_rank = u @ tensors.get_tensor(f"{name}.v").float()
        else:
            self.low_rank = torch.zeros_like(self.weight)
        self.correction = 0
        if f"{name}.correction" in keys:
            self.correction = tensors.get_tensor(f"{name}.correction")

    def forward(self, x):
        bias = 0 if self.bias is None else self.bias
        if x.numel() // x.shape[-1] > self.limit:
            return x @ self.weight.T + bias
        if self.first is not None:
            kept, both = (x * (x.abs() > row) for row in self.threshold)
            y = kept @ self.first.T + both @ (self.weight - self.first).T
            return y + self.correction + bias
        kept = x * (x.abs() > self.threshold)
        y = kept @ self.weight.T + (x - kept) @ self.low_rank.T
        return y + self.correction + bias


class FusedLinear(torch.nn.Module):
    """Linears of one input; their outputs side by side."""

    def __init__(self, parts):
        super().__init__()
        self.parts = torch.nn.ModuleList(parts)

    def forward(self, x):
        return torch.cat([part(x) for part in self.parts], dim=-1)


class WithAdapter(torch.nn.Module):
    """y = base(x) + scale B A x."""

    def __init__(self, base, a, b, scale):
        super().__init__()
        self.base, self.a, self.b, self.scale = base, a, b, scale

    def forward(self, x):
        return self.base(x) + self.scale * (x @ self.a.T @ self.b.T)


class PlainPyTorch:
    """The model with the formula in its linears, one prompt at a time, greedy.

    ``weights`` is a directory of the dequantised model where ``model_dir`` is not, and
    ``first`` the first planes of its linears by name where there are two.
    """

    def __init__(self, model_dir, limit, weights=None, first=None):
        config = AutoConfig.from_pretrained(model_dir)
        del config.quantization_config
        self.model = AutoModelForCausalLM.from_pretrained(
            weights or model_dir,
            config=config,
            dtype=torch.float32,
            # transformers' fused attention leaves out the soft cap of Gemma 2.
            attn_implementation="eager",
        )
        self.model_dir = model_dir
        planes = first or {}
        info = json.loads((model_dir / "rsparse/rsparse.json").read_text())
        listed = info["linears"]
        if "sparse_head" in info:
            listed["lm_head"] = info["sparse_head"]
        with safe_open(model_dir / "rsparse/rsparse.safetensors", "pt") as tensors:
            for name, linear in list(self.model.named_modules()):
                parent, _, label = name.rpartition(".")
                prefix = f"{parent}." if parent else ""
                names = [f"{prefix}{part}" for part in PARTS.get(label, (label,))]
                if not isinstance(linear, torch.nn.Linear) or names[0] not in listed:
                    continue
                sizes = [listed[name]["shape"][0] for name in names]
                weights = linear.weight.split(sizes)
                biases = [None] * len(names)
                if linear.bias is not None:
                    biases = linear.bias.split(sizes)
                parts = [
                    SparseLinear(weight, bias, name, tensors, limit, planes.get(name))
                    for name, weight, bias in zip(names, weights, biases, strict=True)
                ]
                self.model.set_submodule(name, FusedLinear(parts))

    def add_adapter(self, directory):
        """Put a LoRA adapter in peft's file format on the linears."""
        config = json.loads((directory / "adapter_config.json").read_text())
        scale = config["lora_alpha"] / config["r"]
        tensors = load_file(directory / "adapter_model.safetensors")
        for key in [key for key in tensors if ".lora_A." in key]:
            name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            a, b = tensors[key], tensors[key.replace("lora_A", "lora_B")]
            base = self.model.get_submodule(name)
            self.model.set_submodule(name, WithAdapter(base, a, b, scale))

    def generate(self, prompt, new_tokens):
        """Token ids, and for each the logits it was chosen from."""
        tokenizer = AutoTokenizer.from_pretrained(self.model_dir)
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        out = self.model.generate(
            ids,
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        )
        return out.sequences[0, ids.shape[1] :].tolist(), torch.cat(out.logits)

    @contextmanager
    def shifted(self, share):
        """With every threshold moved by this share of it."""
        linears = [m for m in self.model.modules() if isinstance(m, SparseLinear)]
        kept = [linear.threshold for linear in linears]
        for linear in linears:
            linear.threshold = linear.threshold * (1 + share)
        yield
        for linear, threshold in zip(linears, kept, strict=True):
            linear.threshold = threshold

    def log_probabilities(self, tokens):
        """Of each token after the first, given those before it: float32 [len - 1]."""
        with torch.no_grad():
            logits = self.model(torch.tensor([tokens])).logits[0, :-1]
        targets = torch.tensor(tokens[1:]).unsqueeze(1)
        return logits.log_softmax(-1).gather(1, targets).squeeze(1)


@pytest.fixture(scope="session")
def plain_pytorch():
    """Call with a prepared directory and ``limit``: a PlainPyTorch."""
    return PlainPyTorch


@pytest.fixture(scope="session")
def prepared(pyllama, tmp_path_factory):
    """A model prepared by the command, from files of the standard library.

    Not with the default recipe: there one channel that falls on the other side of its
    threshold was seen to move a logit by 1.5, and tokens then turn that no rounding
    explains.
    """
    stdlib = Path(sysconfig.get_path("stdlib"))
    output = tmp_path_factory.mktemp("prepared") / "pyllama-rs50"
    command = [BIN / "vllm-rsparse", "prepare", pyllama, output, "--sparsity", "0.5"]
    command += ["--calibration-samples", "4", "--calibration-tokens", "512"]
    command += ["--recipe", "uniform"]
    texts = [stdlib / f"{name}.py" for name in ("argparse", "ast", "typing")]
    subprocess.run([*command, "--calibration-data", *texts], check=True)
    return output


@pytest.fixture(scope="session")
def offline(tmp_path_factory):
    """vLLM without a server: an ``OfflineEngines``."""
    engines = OfflineEngines(tmp_path_factory.mktemp("offline"))
    yield engines
    engines.close()


@pytest.fixture(scope="session")
def serve(tmp_path_factory):
    """Call with a model, options and environment: a ServerProcess, not yet started."""
    folder = tmp_path_factory.mktemp("serve")
    template = folder / "chat.jinja"
    template.write_text(CHAT_TEMPLATE)

    def make(model, *options, eager=True, **env):
        argv = [BIN / "vllm", "serve", model, "--served-model-name", "m"]
        argv += ["--dtype", "float32", "--max-model-len", "256", "--max-num-seqs", "8"]
        argv += ["--chat-template", template, *options]
        # Prefix caching would make a repeated prompt shorter, and so its route another.
        argv += ["--no-enable-prefix-caching"]
        if eager:
            argv += ["--enforce-eager"]
        environment = {
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 2) // 2)),
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
            "TRITON_INTERPRET": "0",  # set by conftest for the kernels' own tests
            **env,
        }
        log = folder / f"{len(list(folder.iterdir()))}.log"
        return ServerProcess([str(a) for a in argv], log, env=environment)

    return make
