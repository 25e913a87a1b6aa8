# SPDX-License-Identifier: Apache-2.0
"""The model in plain PyTorch with the formula written out, apart from the package."""

import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer


class SparseLinear(torch.nn.Module):
    """y = W s(x) + U V (x - s(x)) + correction, dense above ``limit`` tokens."""

    def __init__(self, linear, name, tensors, limit):
        super().__init__()
        self.weight, self.bias, self.limit = linear.weight, linear.bias, limit
        keys = tensors.keys()
        self.threshold = tensors.get_tensor(f"{name}.thresholds")
        if f"{name}.u" in keys:
            u = tensors.get_tensor(f"{name}.u").float()
            self.low_rank = u @ tensors.get_tensor(f"{name}.v").float()
        else:
            self.low_rank = torch.zeros_like(self.weight)
        self.correction = 0
        if f"{name}.bias" in keys:
            self.correction = tensors.get_tensor(f"{name}.bias")

    def forward(self, x):
        bias = 0 if self.bias is None else self.bias
        if x.numel() // x.shape[-1] > self.limit:
            return x @ self.weight.T + bias
        kept = x * (x.abs() > self.threshold)
        y = kept @ self.weight.T + (x - kept) @ self.low_rank.T
        return y + self.correction + bias


class PlainPyTorch:
    """The model with the formula in its linears, one prompt at a time, greedy."""

    def __init__(self, model_dir, limit):
        config = AutoConfig.from_pretrained(model_dir)
        del config.quantization_config
        self.model = AutoModelForCausalLM.from_pretrained(
            model_dir,
            config=config,
            dtype=torch.float32,
            # transformers' fused attention leaves out the soft cap of Gemma 2.
            attn_implementation="eager",
        )
        self.model_dir = model_dir
        with safe_open(model_dir / "rsparse/rsparse.safetensors", "pt") as tensors:
            for name, linear in list(self.model.named_modules()):
                if isinstance(linear, torch.nn.Linear) and ".layers." in name:
                    sparse = SparseLinear(linear, name, tensors, limit)
                    self.model.set_submodule(name, sparse)

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
