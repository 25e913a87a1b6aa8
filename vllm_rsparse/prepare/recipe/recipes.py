# SPDX-License-Identifier: Apache-2.0
"""Recipes: how channels are scored, how the sparsity is shared out, on what inputs.

A recipe is a name known here or a JSON file. A file with ``linears`` fixes what every
linear gets, so that what a search found can be saved, read, edited and used again::

    {"name": "mine", "score": "norm", "allocation": "uniform", "activations": "sparse",
     "correction": true,
     "linears": {"model.layers.0.mlp.up_proj": {"sparsity": 0.4, "rho": 1.0}, ...}}
"""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from vllm_rsparse.errors import PrepareError
from vllm_rsparse.model.linears import Linear
from vllm_rsparse.prepare.recipe.plan import LinearPlan

SCORES = ("magnitude", "norm", "sensitivity")
EVOLUTIONARY = ("evolutionary", "evolutionary-joint")
ALLOCATIONS = ("uniform", "greedy", "sensitivity", "mixed", *EVOLUTIONARY)
ACTIVATIONS = ("dense", "sparse")
FACTORS = ("svd", "regressed")
# How far the linears of a file may add up to another sparsity than --sparsity.
BUDGET_TOLERANCE = 0.002


@dataclass(frozen=True)
class Recipe:
    """The choices of one preparation.

    Attributes:
        name: for people.
        score: what |x_j| is multiplied with to rank channels: nothing ("magnitude"),
            the norm of the weight's column ("norm"), or the root mean square of the
            loss's gradient with respect to x_j through this linear ("sensitivity").
        allocation: every linear the same ("uniform"), least added error per byte within
            each layer ("greedy"), one threshold on the loss per byte for the whole
            model ("sensitivity"), what loses least of these two, their mean, and that
            nearer to even ("mixed"), the paper's search over rho ("evolutionary") or
            over sparsity and rho ("evolutionary-joint") of every linear.
        activations: calibrate thresholds on what the dense model feeds the linears, or
            on what the sparse model does, from the first layer on ("sparse").
        correction: add the mean of what is dropped, as a constant per linear. Where the
            allocation is "mixed" and has to be found, true tries it and factors too,
            and takes each only if less is lost.
        linears: plan of every linear by name; None: as ``allocation`` says.
        factors: where a plan has a rank: the truncated SVD of the weight ("svd"), or,
            for q and k, what best stands in for the dropped part ("regressed").
    """

    name: str
    score: str
    allocation: str
    activations: str
    correction: bool
    linears: dict[str, LinearPlan] | None = None
    factors: str = "svd"

    def __post_init__(self) -> None:
        for key, allowed in (
            ("score", SCORES),
            ("allocation", ALLOCATIONS),
            ("activations", ACTIVATIONS),
            ("factors", FACTORS),
        ):
            if getattr(self, key) not in allowed:
                raise PrepareError(
                    f"recipe {self.name!r}: {key} must be one of {', '.join(allowed)},"
                    f" got {getattr(self, key)!r}"
                )
        if not isinstance(self.correction, bool):
            raise PrepareError(
                f"recipe {self.name!r}: correction must be true or false, got"
                f" {self.correction!r}"
            )
        if self.score != "sensitivity":
            for key, value in (
                ("allocation", "sensitivity"),
                ("allocation", "mixed"),
                ("factors", "regressed"),
            ):
                if getattr(self, key) == value:
                    raise PrepareError(
                        f"recipe {self.name!r}: {key} {value!r} uses the loss's"
                        " gradients, so it needs score 'sensitivity', got"
                        f" {self.score!r}"
                    )

    @property
    def needs_sensitivity(self) -> bool:
        """Whether gradients of the loss are needed."""
        return self.score == "sensitivity"

    def with_plans(self, plans: dict[str, LinearPlan]) -> "Recipe":
        """This recipe with every linear's plan fixed."""
        return replace(self, linears=plans)

    def to_json(self) -> str:
        """Text that ``load_recipe`` reads back."""
        return json.dumps(asdict(self), indent=1) + "\n"


RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe("uniform", "norm", "uniform", "dense", False),
        Recipe("teal", "magnitude", "uniform", "dense", False),
        Recipe("wina", "norm", "uniform", "dense", False),
        Recipe("greedy", "norm", "greedy", "sparse", False),
        Recipe("best", "sensitivity", "mixed", "sparse", True, None, "regressed"),
        Recipe("evolutionary", "norm", "evolutionary", "dense", False),
        Recipe("evolutionary-joint", "norm", "evolutionary-joint", "sparse", True),
    )
}
# Only the paper's own recipe spends bytes on factors when --rho is not given.
DEFAULT_RHO = {"uniform": 0.95}


def load_recipe(source: str) -> Recipe:
    """A recipe by name, or from a JSON file.

    Raises:
        PrepareError: neither a known name nor a readable recipe file.
    """
    if source in RECIPES:
        return RECIPES[source]
    path = Path(source)
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise PrepareError(
            f"--recipe {source}: neither one of {', '.join(RECIPES)} nor a file"
        ) from None
    except (OSError, ValueError) as error:
        raise PrepareError(
            f"--recipe {source}: cannot be read as JSON ({error})"
        ) from error
    if not isinstance(raw, dict):
        raise PrepareError(f"--recipe {source}: expected a JSON object")
    _check_keys(raw, Recipe, {"linears", "factors"}, f"--recipe {source}")
    linears = raw.get("linears")
    if linears is not None:
        if not isinstance(linears, dict):
            raise PrepareError(f"--recipe {source}: `linears` must be an object")
        linears = {name: _plan(v, source, name) for name, v in linears.items()}
    return Recipe(**{**raw, "linears": linears})


def check_plans(recipe: Recipe, linears: Iterable[Linear], sparsity: float) -> None:
    """A file's plans must fit the model and add up to the sparsity asked for.

    Raises:
        PrepareError: a linear is missing or unknown, or the budget differs.
    """
    if recipe.linears is None:
        return
    shapes = {linear.name: linear.shape for linear in linears}
    for name in shapes.keys() ^ recipe.linears.keys():
        state = "lacks" if name in shapes else "lists"
        raise PrepareError(
            f"recipe {recipe.name!r} {state} {name}, so it is for another model"
        )
    dense = sum(n * k for n, k in shapes.values())
    skipped = sum(
        plan.sparsity * shapes[name][0] * shapes[name][1]
        for name, plan in recipe.linears.items()
    )
    if abs(skipped / dense - sparsity) > BUDGET_TOLERANCE:
        raise PrepareError(
            f"recipe {recipe.name!r} adds up to a sparsity of {skipped / dense:.4f},"
            f" but --sparsity is {sparsity}; change one of them"
        )


def _plan(raw: Any, source: str, name: str) -> LinearPlan:
    where = f"--recipe {source}: linears[{name!r}]"
    if not isinstance(raw, dict):
        raise PrepareError(f"{where}: expected an object")
    _check_keys(raw, LinearPlan, set(), where)
    for key, low_allowed in (("sparsity", True), ("rho", False)):
        value = raw[key]
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not 0 <= value <= 1 or (value == 0 and not low_allowed):
            raise PrepareError(f"{where}: {key} is out of range, got {value!r}")
    return LinearPlan(float(raw["sparsity"]), float(raw["rho"]))


def _check_keys(raw: dict[str, Any], cls: type, optional: set[str], where: str) -> None:
    known = [field.name for field in fields(cls)]
    for key in raw:
        if key not in known:
            raise PrepareError(
                f"{where}: unknown key {key!r}; known are {', '.join(known)}"
            )
    for key in known:
        if key not in raw and key not in optional:
            raise PrepareError(f"{where}: key {key!r} is missing")
