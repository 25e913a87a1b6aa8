# SPDX-License-Identifier: Apache-2.0
"""vLLM without a server, run by ``offline.py``: a fork for each job.

Importing vLLM takes 9 s of processor time, more than such a job; here all jobs share
one import. A job is a line of JSON on standard input. The answer is a line with the
exit status of the job's process.
"""

import json
import multiprocessing
import os
import sys
import traceback
from typing import Any, NoReturn


def main() -> None:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    import vllm.entrypoints.llm
    import vllm.v1.worker.cpu_worker  # noqa: F401
    from vllm.model_executor.models import registry
    from vllm.v1.executor import multiproc_executor

    # Each of these would start Python anew: to look at a model's class that is not in
    # vLLM's cache, and for each rank.
    registry._run_in_subprocess = lambda inspect: inspect()
    fork = multiprocessing.get_context("fork")
    multiproc_executor.get_mp_context = lambda: fork

    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            work(json.loads(line))
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


def work(job: dict[str, Any]) -> NoReturn:
    """Run a job with its log for what it prints, and end the process."""
    log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    status = 1
    try:
        run(job)
        status = 0
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def import_from(folder: str) -> None:
    """Make a stand-in of torchvision importable.

    By then transformers has found that it is not installed, and prepares images with
    Pillow.
    """
    import transformers.image_utils  # noqa: F401

    sys.path.insert(0, folder)


def with_image(prompt: Any) -> Any:
    """A prompt as vLLM takes it; ``image`` has the bytes of each pixel, row by row."""
    if not isinstance(prompt, dict) or "image" not in prompt:
        return prompt
    import numpy
    from PIL import Image

    image = Image.fromarray(numpy.array(prompt["image"], dtype=numpy.uint8))
    return {"prompt": prompt["prompt"], "multi_modal_data": {"image": image}}


def run(job: dict[str, Any]) -> None:
    """Write, for each prompt, what ``vllm.LLM`` chose and how likely it was."""
    os.environ |= job["env"]
    import torch._dynamo
    from vllm import LLM, SamplingParams

    # Where the model is eager vLLM still compiles helpers of its own, around sampling
    # and the embedding, which takes each engine 3 s.
    torch._dynamo.config.disable = job["engine"]["enforce_eager"]

    if job["torchvision"] is not None:
        import_from(job["torchvision"])
    llm = LLM(**job["engine"])
    prompts = [with_image(prompt) for prompt in job["prompts"]]
    outputs = llm.generate(prompts, SamplingParams(**job["sampling"]))
    found = []
    for output in outputs:
        ids = output.prompt_token_ids[1:]
        given = (output.prompt_logprobs or [None])[1:]
        (chosen,) = output.outputs
        found.append(
            {
                "given": [at[i].logprob for i, at in zip(ids, given, strict=False)],
                "tokens": list(chosen.token_ids),
                "chosen": [
                    at[i].logprob
                    for i, at in zip(
                        chosen.token_ids, chosen.logprobs or [], strict=False
                    )
                ],
            }
        )
    with open(job["out"], "w") as stream:
        json.dump(found, stream)


if __name__ == "__main__":
    main()
