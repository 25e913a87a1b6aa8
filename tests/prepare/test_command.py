# SPDX-License-Identifier: Apache-2.0
"""The command line of ``prepare``, in processes of its own."""

import json
import shlex
import signal
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from vllm_rsparse import cli

TEXT = Path(sysconfig.get_path("stdlib")) / "argparse.py"


def _command(model: Path, output: Path, *more: str) -> list[str]:
    """The command, with options that ``more`` replaces by its own."""
    usual = {"--sparsity": "0.5", "--calibration-data": str(TEXT), "--device": "cpu"}
    options = [
        word
        for option, value in (usual | {"--recipe": "uniform"}).items()
        if option not in more
        for word in (option, value)
    ]
    program = [sys.executable, "-m", "vllm_rsparse.cli"]
    return [*program, "prepare", str(model), str(output), *options, *more]


def test_a_user_sees_the_table_and_the_next_command(
    pyllama: Path, tmp_path: Path
) -> None:
    output = tmp_path / "my model"
    done = subprocess.run(
        _command(
            pyllama, output, "--calibration-samples", "2", "--calibration-tokens", "128"
        ),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    *table, card, serve = done.stdout.splitlines()
    assert [row.split()[0] for row in table] == [
        "linear",
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
        "all",
    ]
    assert table[0].split(maxsplit=1)[1].split("  ")[0] == "target"
    name, target, achieved, rank, error = table[1].split()
    assert (name, target, rank) == ("q_proj", "0.500", "4.0")
    assert 0.49 < float(achieved) < 0.51
    assert 0 < float(error) < 1
    quoted = shlex.quote(str(output))
    assert quoted != str(output)
    assert serve == f"serve it with: vllm serve {quoted} --quantization rsparse"
    assert card.startswith("model card: vllm-rsparse, recipe uniform: ")
    assert "achieved sparsity 0.5" in done.stderr
    assert "28/28" in done.stderr


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--sparsity", "1.5"], "error: --sparsity must lie in [0, 1), got 1.5"),
        (["--calibration-data", "/no/file"], "error: --calibration-data /no/file: can"),
        (["--rho", "0"], "error: --rho must lie in (0, 1]"),
        (["--save-recipe", "/no/r.json"], "error: --save-recipe /no/r.json: there is"),
    ],
)
def test_errors_are_one_line_and_leave_nothing(
    more: list[str],
    message: str,
    pyllama: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main(_command(pyllama, tmp_path / "out", *more)[3:]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"vllm-rsparse prepare: {message}")
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_debug_shows_where_an_error_comes_from(pyllama: Path, tmp_path: Path) -> None:
    arguments = _command(pyllama, tmp_path / "out", "--rho", "0")[3:]
    with pytest.raises(ValueError, match="--rho"):
        cli.main(["--debug", *arguments])


def test_help_needs_no_torch() -> None:
    code = (
        "import sys\n"
        "from vllm_rsparse import cli\n"
        "try:\n"
        "    cli.main(sys.argv[1:])\n"
        "finally:\n"
        "    assert 'torch' not in sys.modules\n"
    )
    for arguments in (["--help"], ["prepare", "--help"]):
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert "prepare" in done.stdout
    assert "--calibration-data FILE" in done.stdout


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_interrupting_leaves_nothing_that_could_be_served(
    number: signal.Signals, pyllama: Path, tmp_path: Path
) -> None:
    process = subprocess.Popen(
        _command(pyllama, tmp_path / "out"), stderr=subprocess.PIPE, text=True
    )
    try:
        deadline = time.monotonic() + 120
        while not list(tmp_path.iterdir()) and time.monotonic() < deadline:
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(number)
        _, error = process.communicate(timeout=120)
    finally:
        process.kill()
        process.wait()
    assert (
        process.returncode
        == {
            signal.SIGINT: 130,
            signal.SIGTERM: 128 + signal.SIGTERM,
            signal.SIGKILL: -signal.SIGKILL,
        }[number]
    )
    assert "Traceback" not in error
    if number == signal.SIGKILL:  # cannot be caught, so a staging directory may stay
        assert not (tmp_path / "out").exists()
        assert not list(tmp_path.rglob("config.json"))
    else:  # what was found so far, if anything was
        assert {path.name for path in tmp_path.iterdir()} <= {"out.search"}


MEASURE = """
import sys
from vllm_rsparse import cli
status = cli.main(sys.argv[1:])
# Not getrusage: it starts from the size of the process that forked this one.
peak = [line for line in open("/proc/self/status") if line.startswith("VmHWM")]
print(peak[0].split()[1])
sys.exit(status)
"""


def _random_llama(directory: Path, layers: int, tokenizer: Path) -> Path:
    """Layers of 14 MB in bfloat16 (28 MB in float32), each in a file of its own."""
    hidden, intermediate = 768, 2048
    shapes = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (hidden, hidden),
        "self_attn.v_proj": (hidden, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (intermediate, hidden),
        "mlp.up_proj": (intermediate, hidden),
        "mlp.down_proj": (hidden, intermediate),
    }
    directory.mkdir()
    weight_map = {}

    def save(file: str, tensors: dict[str, torch.Tensor]) -> None:
        save_file(tensors, directory / file)
        weight_map.update(dict.fromkeys(tensors, file))

    save(
        "outer.safetensors",
        {
            "model.embed_tokens.weight": torch.randn(4096, hidden).bfloat16(),
            "model.norm.weight": torch.ones(hidden).bfloat16(),
        },
    )
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        tensors = {
            f"{prefix}.{kind}.weight": (torch.randn(shapes[kind]) * 0.02).bfloat16()
            for kind in shapes
        }
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}.{norm}.weight"] = torch.ones(hidden).bfloat16()
        save(f"{layer}.safetensors", tensors)
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": 12,
        "num_key_value_heads": 12,
        "vocab_size": 4096,
        "tie_word_embeddings": True,
        "max_position_embeddings": 2048,
        "dtype": "bfloat16",
    }
    (directory / "config.json").write_text(json.dumps(config))
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (directory / file).write_bytes((tokenizer / file).read_bytes())
    return directory


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_does_not_grow_with_the_number_of_layers(
    tmp_path: Path, pyllama: Path
) -> None:
    peaks = {}
    for layers in (2, 10):
        model = _random_llama(tmp_path / str(layers), layers, pyllama)
        arguments = _command(
            model,
            tmp_path / f"{layers}-out",
            "--rho",
            "1",
            "--calibration-samples",
            "1",
            "--calibration-tokens",
            "256",
        )[3:]
        done = subprocess.run(
            [sys.executable, "-c", MEASURE, *arguments],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        peaks[layers] = int(done.stdout.split()[-1])
    # In KiB. Keeping the layers would add 8 x 14 MB (as read) to 8 x 28 MB.
    assert abs(peaks[10] - peaks[2]) < 0.1 * peaks[2], peaks
    assert peaks[2] * 0.1 < 8 * 14 * 1024, "layers too small to be seen"
