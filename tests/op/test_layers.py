# SPDX-License-Identifier: Apache-2.0
"""Numbered layers: operands that are kept between calls, and observers of calls."""

import gc
import weakref

import pytest
import torch

from vllm_rsparse.op import layers, observers
from vllm_rsparse.op.backends import Backend
from vllm_rsparse.testing.cases import make_case, relative_error
from vllm_rsparse.testing.tolerances import SUMS


class TestNumberedLayers:
    """Operands of a numbered layer are kept between calls, and never stale."""

    @pytest.fixture
    def layer(self):
        number = layers.next_layer()
        yield number
        layers.forget_layer(number)

    def test_values_that_change_in_place_count(self, layer):
        case = make_case(2)
        layers.set_layer(case.operands.thresholds, layer)
        before = case.through_op(Backend.CPU)
        case.operands.weight.data.mul_(2)
        assert not torch.equal(case.through_op(Backend.CPU), before)
        assert relative_error(case.through_op(Backend.CPU), case.exact()) < SUMS

    def test_other_tensors_of_the_same_number_count(self, layer):
        for seed in range(3):
            case = make_case(2, shard_sizes=(30 + seed,), ranks=(seed,), seed=seed)
            layers.set_layer(case.operands.thresholds, layer)
            for _ in range(2):
                out = case.through_op(Backend.CPU)
                assert relative_error(out, case.exact()) < SUMS

    @pytest.mark.parametrize("name", ["u", "v", "correction"])
    def test_one_other_tensor_is_noticed(self, layer, name):
        case = make_case(2)
        layers.set_layer(case.operands.thresholds, layer)
        case.through_op(Backend.CPU)
        other = case.with_operands(**{name: getattr(case.operands, name) * 2})
        out = other.through_op(Backend.CPU)
        assert relative_error(out, other.exact()) < SUMS

    def test_forgotten_tensors_are_released(self, layer):
        case = make_case()
        layers.set_layer(case.operands.thresholds, layer)
        case.through_op(Backend.CPU)
        memory = weakref.ref(case.operands.weight.data)
        del case
        gc.collect()
        assert memory() is not None
        layers.forget_layer(layer)
        gc.collect()
        assert memory() is None

    def test_compiled_graphs_call_the_op_with_the_numbered_tensors(self, layer):
        """Else every call of a compiled model would build its operands anew."""
        case = make_case(2)
        layers.set_layer(case.operands.thresholds, layer)
        compiled = torch.compile(case.through_op, fullgraph=True, dynamic=False)
        with torch.no_grad():
            out = compiled(int(Backend.CPU))
            kept = layers._operands[layer]
            assert kept.weight.data is case.operands.weight.data
            compiled(int(Backend.CPU))
        assert layers._operands[layer] is kept
        assert relative_error(out, case.exact()) < SUMS


class TestObservers:
    @pytest.fixture
    def case(self):
        case, number = make_case(2), layers.next_layer()
        layers.set_layer(case.operands.thresholds, number)
        yield case, number
        layers.forget_layer(number)

    def test_all_see_every_call_of_a_numbered_layer(self, case):
        case, number = case
        seen = {"first": [], "second": []}
        added = [
            lambda layer, x, operands, dense, name=name: seen[name].append(
                (layer, len(x), operands.weight.n, dense)
            )
            for name in seen
        ]
        for observer in added:
            observers.add_observer(observer)
        try:
            case.through_op(Backend.REFERENCE)
            observers.remove_observer(added[0])
            case.through_op(Backend.REFERENCE, max_sparse_tokens=1)
            make_case().through_op(Backend.REFERENCE)  # has no number
        finally:
            observers.remove_observer(added[1])
        case.through_op(Backend.REFERENCE)
        sparse, dense = (number, 2, 66, False), (number, 2, 66, True)
        assert seen == {"first": [sparse], "second": [sparse, dense]}

    def test_removing_one_that_is_not_there_is_no_error(self):
        observers.remove_observer(lambda *call: None)

    def test_numbers_are_not_given_twice(self):
        assert len({layers.next_layer() for _ in range(3)}) == 3
