# SPDX-License-Identifier: Apache-2.0
"""The Triton backend against the definition in ``vllm_rsparse.op.reference``.

On a machine without CUDA the kernels run in Triton's interpreter, program after
program; with CUDA they are compiled and the same tests run on the device.
"""

from dataclasses import replace
from functools import partial

import pytest
import torch

pytest.importorskip("triton")

from vllm_rsparse.kernels import rsparse_linear as launcher
from vllm_rsparse.kernels.launch_config import LaunchConfig
from vllm_rsparse.op import reference
from vllm_rsparse.op.triton_backend import rsparse_linear
from vllm_rsparse.testing import cases
from vllm_rsparse.testing.cases import assert_close

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
make_case = partial(cases.make_case, device=DEVICE)
DTYPES = [torch.float32, torch.float16, torch.bfloat16]

VECTOR = LaunchConfig(32, 64, 1, 2, 1, use_dot=False)
# Lists of up to 128 channels at K = 77, steps of 16: whole steps and a remainder.
LISTED = LaunchConfig(32, 16, 1, 1, 1, use_dot=False, listed=True)
DOT = LaunchConfig(32, 32, 1, 2, 2, use_dot=True)
CONFIGS = [VECTOR, LISTED, DOT]
CONFIG_IDS = ["masked", "listed", "dot"]


class TestAgainstReference:
    @pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).split(".")[1])
    @pytest.mark.parametrize("tokens", [1, 3])
    def test_dtypes(self, tokens: int, dtype: torch.dtype) -> None:
        case = make_case(tokens, k=203, dtype=dtype)
        assert_close(rsparse_linear(*case.args()), case.expected())

    @pytest.mark.parametrize("tokens", [0, 1, 2, 4, 5, 8, 15, 16, 17, 33])
    def test_tokens(self, tokens: int) -> None:
        case = make_case(tokens)
        out = rsparse_linear(*case.args())
        assert out.shape == (tokens, 66)
        if tokens:
            assert_close(out, case.expected())

    @pytest.mark.parametrize("k", [1, 31, 64, 65, 300])
    @pytest.mark.parametrize("n", [1, 33, 64])
    @pytest.mark.parametrize("tokens", [1, 2, 5])
    def test_shapes(self, tokens: int, n: int, k: int) -> None:
        case = make_case(tokens, k, (n,), (0,))
        for config in [VECTOR, LISTED] if tokens < 5 else [DOT]:
            assert_close(rsparse_linear(*case.args(), config), case.expected())

    @pytest.mark.parametrize(
        ("shard_sizes", "ranks"),
        [
            ((40,), (7,)),
            ((48, 48), (0, 0)),
            ((48, 48), (80, 3)),
            ((33, 1, 1), (0, 1, 16)),
            ((33, 17, 17), (17, 0, 0)),
            ((5, 6, 7, 8), (1, 2, 3, 4)),
        ],
        ids=str,
    )
    @pytest.mark.parametrize("tokens", [1, 4])
    def test_shards(
        self, tokens: int, shard_sizes: tuple[int, ...], ranks: tuple[int, ...]
    ) -> None:
        case = make_case(tokens, shard_sizes=shard_sizes, ranks=ranks)
        assert_close(rsparse_linear(*case.args()), case.expected())

    @pytest.mark.parametrize("split_k", [1, 3, 7])
    @pytest.mark.parametrize("ranks", [(0, 0, 0), (5, 0, 19)], ids=str)
    @pytest.mark.parametrize("config", CONFIGS, ids=CONFIG_IDS)
    @pytest.mark.parametrize("tokens", [1, 2, 3])
    def test_splits(
        self, tokens: int, config: LaunchConfig, ranks: tuple[int, ...], split_k: int
    ) -> None:
        # 7 splits of 64 channels: more than the 150 channels fill.
        case = make_case(tokens, 150, ranks=ranks)
        out = rsparse_linear(*case.args(), replace(config, split_k=split_k))
        assert_close(out, case.expected())

    @pytest.mark.parametrize("constants", [False, True])
    def test_optional_constants(self, constants: bool) -> None:
        case = make_case(ranks=(0, 0, 0), constants=constants)
        assert_close(rsparse_linear(*case.args()), case.expected())

    @pytest.mark.parametrize("config", CONFIGS, ids=CONFIG_IDS)
    def test_every_count_of_kept_channels(self, config: LaunchConfig) -> None:
        case = make_case(k=37, shard_sizes=(20,), ranks=(4,), constants=False)
        # Around whole blocks; the interpreter takes half a second for each.
        few = (0, 1, 2, 7, 8, 9, 15, 16, 17, 31, 32, 33, 36, 37)
        for count in few if DEVICE == "cpu" else range(38):
            case.operands.thresholds.fill_(float("inf"))
            case.operands.thresholds[0, torch.randperm(37)[:count]] = -1.0
            assert_close(rsparse_linear(*case.args(), config), case.expected())


class TestMask:
    @pytest.mark.parametrize("config", CONFIGS, ids=CONFIG_IDS)
    def test_ties_are_dropped_and_zeros_follow_the_sign_free_magnitude(
        self, config: LaunchConfig
    ) -> None:
        case = make_case(k=4, shard_sizes=(6,), ranks=(0,), constants=False)
        case.x[0] = torch.tensor([1.5, -1.5, 0.0, -0.0])
        case.operands.thresholds[0] = torch.tensor([1.5, 1.5, 0.0, 0.0])
        assert rsparse_linear(*case.args(), config).count_nonzero() == 0
        case.operands.thresholds[0] = torch.tensor([1.25, 1.25, -1.0, -1.0])
        out = rsparse_linear(*case.args(), config)
        assert_close(out, case.x @ case.operands.weight.data.t())

    @pytest.mark.parametrize("config", CONFIGS, ids=CONFIG_IDS)
    def test_nan_reaches_every_output_of_its_token_only(
        self, config: LaunchConfig
    ) -> None:
        case = make_case(3)
        case.operands.thresholds[:, 11] = float("inf")
        case.x[0, 11] = float("nan")
        out = rsparse_linear(*case.args(), config)
        assert out[0].isnan().all()
        assert not out[1:].isnan().any()

    @pytest.mark.parametrize("config", CONFIGS, ids=CONFIG_IDS)
    def test_dropped_infinity_leaves_no_trace(self, config: LaunchConfig) -> None:
        case = make_case(ranks=(0, 0, 0))
        case.operands.thresholds[:, 3] = float("inf")
        case.x[0, 3] = float("inf")
        assert_close(rsparse_linear(*case.args(), config), case.expected())

    @pytest.mark.parametrize("config", CONFIGS, ids=CONFIG_IDS)
    @pytest.mark.parametrize("tokens", [1, 3])
    def test_rows_that_nobody_keeps_are_not_read(
        self, tokens: int, config: LaunchConfig
    ) -> None:
        case = make_case(tokens, ranks=(0, 0, 0))
        expected = case.expected()
        kept = reference.kept_mask(case.x, case.operands.thresholds)
        unread = ~kept.any(0).any(0)
        assert unread.any()
        case.operands.weight.data[:, unread] = float("nan")
        assert_close(rsparse_linear(*case.args(), config), expected)

    @pytest.mark.parametrize("config", CONFIGS, ids=CONFIG_IDS)
    def test_rows_of_v_that_nobody_drops_are_not_read(
        self, config: LaunchConfig
    ) -> None:
        case = make_case(shard_sizes=(30,), ranks=(6,))
        expected = case.expected()
        kept = reference.kept_mask(case.x, case.operands.thresholds)[0, 0]
        assert kept.any()
        case.operands.v[:, kept] = float("nan")
        assert_close(rsparse_linear(*case.args(), config), expected)


@pytest.mark.parametrize("config", CONFIGS, ids=CONFIG_IDS)
def test_bitwise_repeatable(config: LaunchConfig) -> None:
    # The interpreter runs programs one after the other: there is little to repeat.
    k, times = (150, 1) if DEVICE == "cpu" else (500, 50)
    case = make_case(16 if config is DOT else 3, k=k, dtype=torch.bfloat16)
    config = replace(config, split_k=3)
    first = rsparse_linear(*case.args(), config)
    for _ in range(times):
        assert torch.equal(rsparse_linear(*case.args(), config), first)


@pytest.mark.parametrize("tokens", [3, 9])
def test_vector_units_in_groups_of_tokens(tokens: int) -> None:
    case = make_case(tokens, k=150)
    for config in (VECTOR, LISTED):
        assert_close(rsparse_linear(*case.args(), config), case.expected())


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("config", CONFIGS, ids=CONFIG_IDS)
def test_wide_offsets_change_nothing(
    config: LaunchConfig, wide: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = make_case(2)
    monkeypatch.setattr(launcher, "_extent", lambda matrix: 2**31 if wide else 1)
    assert_close(rsparse_linear(*case.args(), config), case.expected())


def test_long_inputs_are_split_until_the_lists_are_short(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(launcher, "MOST_LISTED", 32)
    case = make_case(2, k=300)
    assert_close(rsparse_linear(*case.args(), LISTED), case.expected())


@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), -1e30])
@pytest.mark.parametrize("tokens", [2, 3, 4])
def test_padding_tokens_leave_no_trace(tokens: int, garbage: float) -> None:
    # A CUDA graph of four tokens also runs steps of one; the rest of x is left over
    # from other steps. The configuration is the default for this number of tokens.
    case = make_case(tokens, 150, (48, 33, 17), dtype=torch.bfloat16)
    case.x[1:] = 0
    alone = rsparse_linear(*case.args())[0]
    case.x[1:] = garbage
    together = rsparse_linear(*case.args())[0]
    assert torch.equal(together, alone)
    assert_close(together, case.expected()[0])


def test_a_token_does_not_depend_on_its_batch() -> None:
    case = make_case(7, k=300, dtype=torch.float16)
    together = rsparse_linear(*case.args(), DOT)
    for token in range(7):
        alone = replace(case, x=case.x[token : token + 1])
        assert torch.equal(rsparse_linear(*alone.args(), DOT)[0], together[token])


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="CUDA graphs need a CUDA device")
@pytest.mark.parametrize("tokens", [1, 2, 16])
def test_replayed_graph_follows_its_inputs(tokens: int) -> None:
    case = make_case(tokens, 1000, (512, 128, 128), (50, 20, 0), torch.bfloat16)
    # Kernels compile before the capture, as an engine's warm-up makes them.
    rsparse_linear(*case.args())
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outs = [rsparse_linear(*case.args()) for _ in range(3)]
    for seed in range(5):
        case.x.copy_(make_case(tokens, 1000, seed=seed + 1).x)
        graph.replay()
        expected = case.expected()
        for out in outs:
            assert_close(out, expected)
