"""Dense model -> MoE model ("upcycling") as a pure function on parameters."""

from __future__ import annotations

from typing import Any

import numpy as np

from medmoe_jax.config import ConfigError, ModelConfig, MoeConfig
from medmoe_jax.stored import Stored

MODES = ("paper", "function_preserving")


def _last_layer(tree: dict[str, Any]) -> str:
    """Name of the linear layer that an FFN ends with."""
    return "down" if "down" in tree else "fc2"


def _scaled_end(ffn: dict[str, Any], factor: float) -> dict[str, Any]:
    """The FFN with its output multiplied by `factor`."""
    last = _last_layer(ffn)
    scaled = {k: v * np.asarray(factor, v.dtype) for k, v in ffn[last].items()}
    return ffn | {last: scaled}


def upcycle(
    params: dict[str, Any],
    cfg: ModelConfig,
    moe: MoeConfig,
    router: dict[str, Any],
    mode: str = "paper",
) -> tuple[dict[str, Any], ModelConfig]:
    """Replaces the FFN of the layers that `moe.placement` names by a mixture of experts.

    The FFN is copied into every expert and into the meta expert, the router into every MoE layer.

    Two modes:
      paper: plain copies, as the official code does. A top-1 layer then yields (1 + g) MLP(x) and a
        top-2 layer 2 MLP(x): training does not start from the function that stage 2 learned.
      function_preserving: the same function as the dense model at step 0. The experts keep the
        copied input layers and their output layer starts at zero, so that the routed part adds
        nothing until it has learned something, while the meta expert is the FFN itself. With
        use_residual the layer is c0 routed + (1 + c1) meta; there the mixing coefficients start
        equal (zero kernel and bias, c1 = 1/2) and the meta expert's output is scaled by 2/3.
        Without a meta expert only top-2 can preserve the function: plain copies with weights that
        sum to one.

    Args:
      params: dense parameters (arrays or `Stored` leaves, which are not read), see
        `models.medmoe.leaves`.
      cfg: the dense model.
      moe: the mixture.
      router: fc1 (, fc2, fc3) with kernel [D, E] and bias [E].
      mode: one of MODES.

    Returns:
      The parameters of the MoE model (the unchanged leaves are shared, not copied) and its config.

    Raises:
      ConfigError: the model is a MoE model already, the router has another shape, or the mode
        cannot work.

    Source: paper section 2.3; official `initialize_moe_modules`.
    """
    if cfg.moe:
        raise ConfigError(
            "upcycle: the model has experts already; start from a dense (stage 2) model"
        )
    if mode not in MODES:
        raise ConfigError(f"upcycle {mode!r} is unknown; use one of {', '.join(MODES)}")
    _check_router(router, cfg, moe)
    new = ModelConfig(cfg.vision, cfg.llm, cfg.projector, moe).validate()
    dense, placed = params["llm"]["mlp"], list(new.moe_layers)
    chosen = _map(lambda a: a[np.asarray(placed)], dense)
    experts, meta = chosen, chosen
    if mode == "function_preserving" and moe.meta:
        experts = _scaled_end(chosen, 0.0)
        if moe.use_residual:
            meta = _scaled_end(chosen, 2 / 3)
    elif mode == "function_preserving" and moe.top_k == 1:
        raise ConfigError(
            "upcycle: top-1 without a meta expert scales the FFN by a probability below one and "
            "cannot preserve the "
            "function; set moe.meta=True, moe.top_k=2 or upcycle='paper'"
        )
    n = len(placed)
    tree: dict[str, Any] = {
        "router": _map(lambda a: np.repeat(np.asarray(a)[None], n, 0), router),
        "experts": _map(lambda a: _copies(a, moe.experts), experts),
    }
    if moe.meta:
        tree["meta"] = meta
    if moe.use_residual:
        width = cfg.llm.width
        tree["coefficient"] = {
            "kernel": np.zeros((n, width, 2), np.float32),
            "bias": np.zeros((n, 2), np.float32),
        }
    llm = {k: v for k, v in params["llm"].items() if k != "mlp"} | {"moe": tree}
    if new.dense_layers:
        llm["mlp"] = _map(lambda a: a[np.asarray(new.dense_layers)], dense)
    return {k: v for k, v in params.items() if k != "router"} | {"llm": llm}, new


def _copies(a: Any, times: int) -> Any:
    """[N, ...] -> [N, times, ...] as a view: no host holds the same numbers once an expert."""
    if isinstance(a, Stored):
        return a.repeated(times)
    return np.broadcast_to(np.asarray(a)[:, None], (len(a), times, *a.shape[1:]))


def _check_router(router: dict[str, Any], cfg: ModelConfig, moe: MoeConfig) -> None:
    last = f"fc{len(router)}"
    shape = tuple(router[last]["kernel"].shape)
    if len(router) != moe.router_layers or shape != (cfg.llm.width, moe.experts):
        raise ConfigError(
            f"the router has {len(router)} layer(s) and ends in {shape}; the model needs "
            f"{moe.router_layers} layer(s) "
            f"ending in ({cfg.llm.width}, {moe.experts}): set model.moe.experts and "
            "model.moe.router_layers to match it"
        )


def _map(fn: Any, tree: Any) -> Any:
    """`fn` on every array of a nested dict."""
    if isinstance(tree, dict):
        return {k: _map(fn, v) for k, v in tree.items()}
    return fn(tree)
