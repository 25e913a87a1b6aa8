# SPDX-License-Identifier: Apache-2.0
"""``vllm.LLM`` for tests that need no server: its tokens and log probabilities."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch

ALWAYS_SPARSE = {"VLLM_RSPARSE_MAX_SPARSE_TOKENS": "100000"}
# float32 keeps results from hanging on rounding.
ENGINE = {"dtype": "float32", "enforce_eager": True, "enable_prefix_caching": False}


class OfflineEngines:
    """Engines one after the other, each in a fork of a process that imported vLLM.

    Attributes:
        log: what the latest engine printed.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.log = folder / "engine.log"
        self.process: subprocess.Popen[str] | None = None

    def score(self, model: Path, tokens: list[int]) -> torch.Tensor:
        """The log probability of each token after the first, all on the sparse route.

        Returns:
            float32 [len(tokens) - 1].
        """
        engine = {"max_model_len": len(tokens) + 8, "max_num_seqs": 2}
        (found,) = self.run(
            ALWAYS_SPARSE,
            {"model": str(model), "skip_tokenizer_init": True, **engine},
            [{"prompt_token_ids": tokens}],
            {"max_tokens": 1, "prompt_logprobs": 0, "detokenize": False},
        )
        assert len(found["given"]) == len(tokens) - 1
        return torch.tensor(found["given"])

    def run(
        self,
        env: dict[str, str],
        engine: dict[str, object],
        prompts: list[object],
        sampling: dict[str, object],
        torchvision: Path | None = None,
    ) -> list[dict[str, list]]:
        """Start an engine, complete the prompts, end it.

        Args:
            env: of the engine's process.
            engine: arguments of ``vllm.LLM``.
            prompts: text, token ids, or ``prompt`` and ``image``, rows of pixels.
            sampling: arguments of ``vllm.SamplingParams``.
            torchvision: folder that has a stand-in of it.

        Returns:
            For each prompt its ``tokens``, the log probabilities of these (``chosen``)
            and of the prompt's tokens after the first (``given``), where ``sampling``
            asks for them.
        """
        out = self.folder / "out.json"
        job = {"env": env, "engine": ENGINE | engine, "prompts": prompts}
        job |= {"sampling": sampling, "out": str(out), "log": str(self.log)}
        job["torchvision"] = None if torchvision is None else str(torchvision)
        process = self.started()
        process.stdin.write(json.dumps(job) + "\n")
        process.stdin.flush()
        status = process.stdout.readline().strip()
        assert status == "0", f"status {status!r}: {self.log.read_text()[-6000:]}"
        return json.loads(out.read_text())

    def started(self) -> subprocess.Popen[str]:
        if self.process is None:
            environment = os.environ | {
                "VLLM_CPU_KVCACHE_SPACE": "1",
                "VLLM_CPU_OMP_THREADS_BIND": "nobind",
                "OMP_NUM_THREADS": "1",
                "TRITON_INTERPRET": "0",
                "HF_HUB_OFFLINE": "1",
            }
            script = Path(__file__).with_name("offline_engine.py")
            self.process = subprocess.Popen(
                [sys.executable, script],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=environment,
            )
        return self.process

    def close(self) -> None:
        if self.process is not None:
            self.process.stdin.close()
            self.process.wait()
