# SPDX-License-Identifier: Apache-2.0
"""What plans lose on windows that calibrate nothing.

As when served, prompts are dense and answers sparse: in a chat, everything but the
answers is dense, and in every window the leading ``DENSE_FRACTION``, which stands for
the prompt. The figure counts the sparse positions.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from tqdm import tqdm

from vllm_rsparse.errors import CheckpointError
from vllm_rsparse.model.finite import check_activations
from vllm_rsparse.prepare.calibration.head import served_head
from vllm_rsparse.prepare.calibration.layer import Installed, LayerCalibration
from vllm_rsparse.prepare.calibration.propagate import sparse_linears
from vllm_rsparse.prepare.recipe.planned import Planned
from vllm_rsparse.prepare.run import Run, dense_prefix
from vllm_rsparse.prepare.store.run_store import Key
from vllm_rsparse.texts.windows import AnsweredWindows

_DENSE = Key("held-out", "dense")


class HeldOut:
    """KL divergence from the dense model on held-out windows.

    Args:
        run: the model and its calibration text.
        windows: as long as those of the calibration text.

    Attributes:
        tokens: positions that count.

    Raises:
        CheckpointError: no position counts.
    """

    def __init__(self, run: Run, windows: AnsweredWindows) -> None:
        self._run = run
        self._windows = windows.ids
        self._dense = ~windows.answers
        self._dense[:, : dense_prefix(windows.ids)] = True
        self.tokens = int((~self._dense).sum())
        if not self.tokens:
            raise CheckpointError(
                "--calibration-data: the windows that are held out have no answers to"
                " measure on; give more text"
            )
        self._exact: Tensor | None = None

    def divergence(self, planned: Planned) -> float:
        """Mean KL(dense || sparse), nats, of the artifact that plans give.

        Calibrates on the run's windows, exactly as for the artifact.
        """
        run, model = self._run, self._run.model
        if self._exact is None:
            self._exact = self._run_dense()
        # Together, for the model keeps what its layers are called with by window.
        embedded = model.embed(torch.cat([run.windows, self._windows]))
        hidden, state = embedded.split([len(run.windows), len(self._windows)])
        total = len(run.linears)
        with tqdm(total=total, desc="held out", unit="linear", leave=False) as progress:
            for layer in run.layers:
                calibration = LayerCalibration(run, planned, progress, measured=False)
                calibrate = calibration.on_dense
                if planned.recipe.activations == "sparse":
                    calibrate = calibration.on_sparse
                with model.layer(layer.index) as module:
                    calibrate(layer, module, hidden)
                    self._run_layer(layer.index, module, calibration.installed, state)
        with served_head(run) as head:
            head.calibrate(hidden[:, run.dense_prefix :].flatten(0, 1))
            return head.divergence(self._counted(state), self._exact)

    @torch.no_grad()
    def _run_layer(
        self,
        index: int,
        module: nn.Module,
        installed: Mapping[str, Installed],
        state: Tensor,
    ) -> None:
        """Replace hidden states by the output of a layer with sparse linears."""
        model = self._run.model
        dense, before = self._dense.to(model.device), len(self._run.windows)
        for rows in model.batches(state):
            embedded = slice(before + rows.start, before + rows.stop)
            with sparse_linears(module) as sparse:
                for kind, one in installed.items():
                    sparse.install(kind, one.tensors, dense[rows], one.first)
                state[rows] = model.call_layer(index, state[rows], embedded)

    def _run_dense(self) -> Tensor:
        """The dense model's output of the last layer at the counted positions."""
        model, store = self._run.model, self._run.store
        if _DENSE in store:
            return store.get(_DENSE)[0]["hidden"].to(model.device)
        state = model.embed(self._windows)
        for layer in self._run.layers:
            with model.layer(layer.index):
                model.run_layer(layer.index, state)
            check_activations(state, f"the output of decoder layer {layer.index}")
        exact = self._counted(state)
        store.put(_DENSE, {"hidden": exact})
        return exact

    def _counted(self, state: Tensor) -> Tensor:
        return state[~self._dense.to(state.device)]
