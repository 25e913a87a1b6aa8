# SPDX-License-Identifier: Apache-2.0
"""The dense model's hidden states between its layers, on disk."""

from torch import Tensor
from tqdm import tqdm

from vllm_rsparse.model.finite import check_activations
from vllm_rsparse.prepare.run import Run
from vllm_rsparse.prepare.store.run_store import Key, RunStore


class LayerStates:
    """Hidden states that ``run_dense`` has kept.

    Args:
        store: where they are.
        layers: how many layers they went through.
    """

    def __init__(self, store: RunStore, layers: int) -> None:
        self._store = store
        self._layers = layers

    def entering(self, position: int) -> Tensor:
        """The input of a layer, [samples, tokens, hidden] on the CPU."""
        return self._store.get(_entering(position))[0]["hidden"]

    def leaving(self) -> Tensor:
        """The output of the last layer, in the form of ``entering``."""
        return self.entering(self._layers)


def run_dense(run: Run, progress: tqdm) -> tuple[Tensor, LayerStates]:
    """One forward pass over the windows, which keeps the input of each layer.

    Args:
        run: the model and its calibration text.
        progress: counts layers.

    Returns:
        The output of the last layer, [samples, tokens, hidden] on the device, and the
        kept states.

    Raises:
        PrepareError: the disk has no room for them.
        NotFiniteError: the output of a layer contains NaN or infinity.
    """
    model, store, layers = run.model, run.store, run.layers
    hidden = model.embed(run.windows)  # also records what the layers are called with
    store.require((len(layers) + 1) * hidden.nbytes)
    states = LayerStates(store, len(layers))
    done = 0
    while done < len(layers) and _entering(done + 1) in store:
        done += 1
    if done > 0:
        hidden = states.entering(done).to(model.device)
    else:
        store.put(_entering(0), {"hidden": hidden})
    progress.update(done)
    for position in range(done, len(layers)):
        index = layers[position].index
        with model.layer(index):
            model.run_layer(index, hidden)
        check_activations(hidden, f"the output of decoder layer {index}")
        store.put(_entering(position + 1), {"hidden": hidden})
        progress.update()
    return hidden, states


def _entering(position: int) -> Key:
    return Key("entering", position)
