# SPDX-License-Identifier: Apache-2.0
"""Launch configurations: lookup, defaults, and the tables that are shipped."""

import json
import logging
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from vllm_rsparse import envs
from vllm_rsparse.kernels.launch_config import LaunchConfig
from vllm_rsparse.op import tables, tuning
from vllm_rsparse.op.dense_defaults import dense_config, packed_dense_tokens
from vllm_rsparse.op.sparse_defaults import default_config, sparse_default
from vllm_rsparse.op.tables import Problem, TunedEntry
from vllm_rsparse.op.tuning import Device

GPU = Device("GPU", 132)
CONFIG = LaunchConfig(128, 32, 4, 2, 1, use_dot=False)
DOT = replace(CONFIG, use_dot=True)


@pytest.fixture
def config_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Empty directories of tables; forgets what was looked up before and after."""

    def forget() -> None:
        tuning.forget_tables()
        tuning._log_untuned.cache_clear()

    shipped, user = tmp_path / "shipped", tmp_path / "user"
    shipped.mkdir()
    user.mkdir()
    monkeypatch.setattr(tables, "SHIPPED", shipped)
    monkeypatch.setenv(envs.TUNING_DIR, str(user))
    forget()
    yield shipped
    forget()


def entry(tokens: int, split_k: int) -> TunedEntry:
    config = replace(CONFIG, split_k=split_k, use_dot=tokens > 2)
    return TunedEntry(64, 256, "bfloat16", tokens, config, 5.0, 9.0)


def write(path: Path, *entries: TunedEntry) -> None:
    tables.write_table(path, list(entries), {"device": "GPU"})


def look_up(tokens: int, n: int = 64, kind: str = "bfloat16", group: int = 0):
    return tuning.launch_config(GPU, Problem(n, 256, kind, group), tokens)


def entry_with(**values: Any) -> str:
    return json.dumps({"entries": [asdict(entry(1, 4)) | values]})


def test_written_tables_read_back(config_dir: Path) -> None:
    path = tables.table_path(config_dir / "new", "Some GPU")
    write(path, entry(8, 2), entry(1, 4))
    assert path == config_dir / "new" / "Some_GPU.json"
    assert tables.read_table(path) == [entry(1, 4), entry(8, 2)]
    assert json.loads(path.read_text())["device"] == "GPU"


@pytest.mark.parametrize(("tokens", "split_k"), [(1, 4), (2, 4), (3, 2), (16, 2)])
def test_nearest_number_of_tokens(config_dir: Path, tokens: int, split_k: int) -> None:
    write(config_dir / "GPU.json", entry(1, 4), entry(8, 2))
    assert look_up(tokens).split_k == split_k


def test_many_tokens_go_to_the_matrix_units(config_dir: Path) -> None:
    write(config_dir / "GPU.json", entry(1, 4))
    assert look_up(16).use_dot


def test_the_users_table_precedes_the_shipped_one_shape_by_shape(
    config_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger=tuning.__name__)
    user = tables.user_directory() / "GPU.json"
    write(config_dir / "GPU.json", entry(1, 4), replace(entry(1, 8), n=128))
    write(user, entry(1, 2))
    assert look_up(1).split_k == 2
    assert look_up(1, n=128).split_k == 8
    assert len(caplog.records) == 1
    assert f"{user} (1), then {config_dir / 'GPU.json'} (2)" in caplog.text


def test_a_missing_folder_of_tables_is_named(
    config_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(envs.TUNING_DIR, str(config_dir / "none"))
    with pytest.raises(tables.TableError, match=f"{envs.TUNING_DIR} is .*none"):
        look_up(1)
    monkeypatch.setenv(envs.TUNING_DIR, "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(config_dir))
    assert tables.user_directory() == config_dir / "vllm_rsparse" / "tuning"
    assert look_up(1) == default_config(64, 256, 1, 132)


def test_formats_and_groups_have_entries_of_their_own(config_dir: Path) -> None:
    packed = LaunchConfig(256, 64, 2, 1, 2, use_dot=False, packed=True)
    made = TunedEntry(64, 256, "int4", 3, packed, 5.0, 9.0, group=128)
    other = replace(made, group=64, config=replace(packed, split_k=4))
    write(config_dir / "GPU.json", entry(1, 4), made, other)
    # Both serve any larger number of tokens.
    for tokens in (3, 16):
        assert look_up(tokens, kind="int4", group=128) == packed
        assert look_up(tokens, kind="int4", group=64).split_k == 4
    untuned = look_up(3, kind="int4", group=32)
    assert untuned == sparse_default(64, 256, "int4", 3, 132)


def test_loops_of_few_tokens_have_entries_of_their_own(config_dir: Path) -> None:
    # One token of what has scales in blocks; of four bits, two as well.
    packed = LaunchConfig(256, 64, 2, 1, 2, use_dot=False, packed=True)
    for kind, slotted in (("int4", 2), ("fp8-block", 1)):
        more = TunedEntry(64, 256, kind, slotted + 1, packed, 5.0, 9.0, group=128)
        own = replace(more, tokens=1, config=replace(packed, num_stages=1))
        write(config_dir / "GPU.json", more, own)
        tuning.forget_tables()
        assert look_up(1, kind=kind, group=128).num_stages == 1
        default = sparse_default(64, 256, kind, 2, 132)
        assert look_up(2, kind=kind, group=128) == (default if slotted == 2 else packed)
        assert look_up(3, kind=kind, group=128) == packed


@pytest.mark.parametrize(
    ("tokens", "split_k"), [(1, None), (5, 2), (8, 2), (9, None), (33, 4), (65, None)]
)
def test_the_dense_route_takes_the_next_larger_number_of_tokens(
    config_dir: Path, tokens: int, split_k: int | None
) -> None:
    packed = LaunchConfig(256, 128, 2, 1, 2, use_dot=False, packed=True)
    tiles = LaunchConfig(128, 64, 4, 4, 3, use_dot=True)
    made = TunedEntry(64, 256, "int4", 8, packed, 5.0, 9.0, group=128, route="dense")
    write(config_dir / "GPU.json", made, replace(made, tokens=64, config=tiles))
    problem = Problem(64, 256, "int4", 128)
    found = tuning.dense_launch_config(GPU, problem, tokens)
    assert (found and found.split_k) == split_k
    # The sparse route has entries of its own.
    assert look_up(8, kind="int4", group=128) == sparse_default(64, 256, "int4", 8, 132)


@pytest.mark.usefixtures("config_dir")
def test_untuned_shapes_get_the_default_and_one_line_of_advice(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, logger=tuning.__name__)
    for n in (64, 128, 192):
        assert look_up(1, n=n) == default_config(n, 256, 1, 132)
    assert len(caplog.records) == 1
    assert "--tune" in caplog.text


@pytest.mark.parametrize("tokens", [1, 2, 4, 5, 16])
@pytest.mark.parametrize(("n", "k"), [(1, 1), (6144, 4096), (131072, 50000)])
def test_default_is_valid_for_any_shape(n: int, k: int, tokens: int) -> None:
    assert default_config(n, k, tokens, processors=20).split_k >= 1


@pytest.mark.parametrize("tokens", [1, 16])
def test_default_fills_the_multiprocessors_that_there_are(tokens: int) -> None:
    # Splits double until there are enough programs: four times the processors, two
    # doublings more.
    small = default_config(256, 2**20, tokens, processors=33)
    large = default_config(256, 2**20, tokens, processors=132)
    assert large.split_k == 4 * small.split_k


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", r"expected a JSON object, got \[\]; write the table again with"),
        ('{"device": "GPU"}', "key 'entries' is missing"),
        ('{"entries": [{"n": 1}]}', r"entries\[0\]: key 'k' is missing"),
        (entry_with(n=True), r"entries\[0\].n must be an integer >= 1, got True"),
        (entry_with(fast=1), r"entries\[0\]: unknown key 'fast'; known are n, k"),
        (entry_with(config={}), r"entries\[0\].config: key 'block_n' is missing"),
        (
            entry_with(config=asdict(CONFIG) | {"block_n": 48}),
            r"entries\[0\].config: block_n must be a power of two, got 48; write",
        ),
        (entry_with(route="dense"), "config: the dense route has kernels for int4"),
        (
            entry_with(route="dense", config=asdict(DOT)),
            "config: the dense route has kernels for int4.*; got bfloat16",
        ),
        (
            entry_with(route="dense", dtype="int4"),
            "config: the dense route has .* with either packed or use_dot; got int4",
        ),
        (entry_with(dtype="int4"), "config: packed must be true for int4; write"),
        (
            entry_with(config=asdict(CONFIG) | {"num_warps": 1, "packed": True}),
            "config: packed must be false for bfloat16; write",
        ),
    ],
)
def test_broken_tables_are_named(config_dir: Path, text: str, message: str) -> None:
    path = config_dir / "GPU.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        tables.read_table(path)
    assert str(path) in str(error.value)


def test_a_table_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "GPU.json").write_bytes(b"\xff")
    for path in (tmp_path, tmp_path / "GPU.json"):
        with pytest.raises(tables.TableError, match=f"{path}: cannot be read"):
            tables.read_table(path)


@pytest.mark.parametrize(
    "change",
    [{"block_n": 48}, {"block_k": 0}, {"num_warps": 3}, {"split_k": 0}],
    ids=str,
)
def test_impossible_configurations_are_refused(change: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(change))):
        replace(CONFIG, **change)


def test_the_matrix_units_do_not_list() -> None:
    with pytest.raises(ValueError, match="listed must be false"):
        LaunchConfig(16, 16, 1, 4, 1, use_dot=True, listed=True)


def test_dot_needs_tiles_of_the_matrix_units() -> None:
    with pytest.raises(ValueError, match="use_dot"):
        LaunchConfig(8, 64, 1, 4, 1, use_dot=True)


@pytest.mark.parametrize("path", sorted(tables.SHIPPED.glob("*.json")), ids=str)
def test_shipped_tables_are_valid(path: Path) -> None:
    document = json.loads(path.read_text())
    assert tables.table_path(path.parent, document["device"]) == path
    entries = tables.read_table(path)
    assert len({(e.problem, e.tokens) for e in entries}) == len(entries) > 0


def test_two_tokens_have_half_the_blocks_a_program() -> None:
    for n, k, kind in ((28672, 4096, "int4"), (4096, 14336, "int8-planes")):
        config = sparse_default(n, k, kind, 2, 132)
        assert k <= 2 * config.block_k * config.split_k


def test_warps_of_one_token_are_resident_all_at_once() -> None:
    small = sparse_default(6144, 4096, "int4", 1, 132)
    assert small.split_k * small.block_k == 4096  # one block of channels a program
    # Registers allow 16 warps a multiprocessor. More only where a program would have
    # more than four blocks.
    for n, k, kind in (
        (28672, 4096, "int4"),
        (28672, 4096, "int8-planes"),
        (4096, 14336, "int8-planes"),
        (5120, 8192, "int8-planes"),
        (5120, 25600, "int4"),
    ):
        large = sparse_default(n, k, kind, 1, 132)
        launched = n // large.block_n * large.split_k * large.num_warps
        assert 6 * 132 < launched <= 16 * 132
    wide = sparse_default(51200, 5120, "int4", 1, 132)
    assert wide.split_k * 4 * wide.block_k == 5120


@pytest.mark.parametrize("tokens", [1, 2])
@pytest.mark.parametrize("n", [64, 4096, 28672])
def test_fp8_is_masked_in_place_unless_there_is_much_to_read(
    n: int, tokens: int
) -> None:
    config = sparse_default(n, 4096, "float8_e4m3fn", tokens, 132)
    assert not config.packed
    assert not config.use_dot
    assert config.listed == (n == 28672)
    assert config.split_k * config.block_k <= 4096


@pytest.mark.parametrize("kind", ["int4", "float8_e4m3fn", "fp8-block", "int8-planes"])
@pytest.mark.parametrize("processors", [20, 132])
@pytest.mark.parametrize(("n", "k"), [(8, 32), (4096, 14336), (51200, 5120)])
def test_dense_defaults_by_tokens(n: int, k: int, processors: int, kind: str) -> None:
    most = packed_dense_tokens(kind)
    few, wide, many = (
        dense_config(n, k, kind, tokens, processors) for tokens in (most, 17, 33)
    )
    assert few.packed
    assert few.num_warps == 1
    assert dense_config(n, k, kind, 32, processors) == wide
    assert dense_config(n, k, kind, 64, processors) == many
    # Most become operands of a warpgroup; int4 those of a warp, from 17 to 32 tokens,
    # and tiles beyond, as planes do where there are many columns.
    tiles_again = kind == "int4" or (kind == "int8-planes" and n > 128 * processors)
    assert (many.packed, many.num_warps) == (not tiles_again, 4)
    assert wide.packed
    assert wide.num_warps == (1 if kind == "int4" else 4)
    more = dense_config(n, k, kind, most + 1, processors)
    assert more.packed
    assert more.num_warps == 4
    # Channels are split into no more programs than run at once.
    tiles = -(-n // many.block_n)
    assert many.split_k == 1 or tiles * many.split_k <= 2 * processors
