"""One optimiser step: losses, gradients, what trains and what does not, and the schedule."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import small_models
from flax.traverse_util import flatten_dict

from medmoe_jax import lora, optim, step
from medmoe_jax.config import ConfigError, ModelConfig, MoeConfig, OptimConfig, RunConfig
from medmoe_jax.convert import table
from medmoe_jax.models import layers

pytestmark = pytest.mark.usefixtures("quick_compile")

OFFICIAL = ("llm/moe/(experts|meta)/.*", "llm/mlp/.*", "projector/.*")  # stage 3
SGD = OptimConfig(lr=1e-3, schedule="constant", warmup=0.0)


def run_config(model: ModelConfig, train: tuple[str, ...], **changes: Any) -> RunConfig:
    """A run in float32."""
    base = RunConfig(
        model=model,
        train=train,
        compute_dtype="float32",
        frozen_dtype="float32",
        remat="none",
        loss_chunk=0,
        optim=SGD,
    )
    return dataclasses.replace(base, **changes)


def start(cfg: RunConfig, params: dict[str, Any]) -> tuple[Any, step.State, dict[str, Any]]:
    """The transformation, the first state and the frozen parameters."""
    flat = {k: jnp.array(v) for k, v in flatten_dict(params, sep="/").items()}
    label = optim.labels(list(flat), cfg.train)
    train, frozen = optim.split(flat, label)
    tx = optim.make(cfg.optim, 10, label)
    return tx, step.State(jnp.zeros((), jnp.int32), train, tx.init(train | frozen)), frozen


def on_device(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    keys = ("tokens", "image_pos", "labels", "mask", "images", "modality")
    return {key: batch[key] for key in keys}


def first_moment(state: step.State) -> dict[str, Any]:
    """Adam's mean of the gradients of everything that trains."""
    adam = [s for s in jax.tree.leaves(state.opt, is_leaf=_is_adam) if _is_adam(s)]
    assert len(adam) == 1
    return {k: v for k, v in adam[0].mu.items() if not isinstance(v, optax.MaskedNode)}


def _is_adam(node: Any) -> bool:
    return isinstance(node, optax.ScaleByAdamState)


def by_torch_key(cfg: ModelConfig, flat: dict[str, Any], key: str) -> np.ndarray:
    """The part of a path -> array dict that the PyTorch tensor `key` is, in PyTorch's layout."""
    row = next(row for row in table.table(cfg) if row.key == key)
    return row.to_torch(np.asarray(flat[row.path])[row.index])


@pytest.mark.parametrize("name", small_models.GOLDEN_MOE + small_models.GOLDEN_DENSE)
def test_goldens(fixtures: Path, name: str) -> None:
    """Losses of four steps, gradients of the first and parameters after three, as PyTorch's."""
    params, cfg = small_models.golden_params(fixtures / name)
    want = small_models.golden_io(fixtures / name, "train_io")
    norms = json.loads((fixtures / name / "meta.json").read_text())["grad_norms"]
    batch = on_device(small_models.golden_batch(cfg, small_models.golden_io(fixtures / name)))
    train = OFFICIAL if cfg.moe else ("llm/.*", "projector/.*")
    run = run_config(cfg, train, official_aux=True, loss_chunk=7)
    tx, state, frozen = start(run, params)
    one = step.make_step(run, cfg, tx)
    rows = {row.key: row.path for row in table.table(cfg)}
    assert {rows[key] for key in norms} == set(state.train)
    got = []
    for number in range(4):
        state, metrics = one(state, frozen, batch)
        got.append(float(metrics["loss"]))
        if number == 0:  # Adam's first moment is then (1 - b1) times the gradient
            gradient = {k: np.asarray(v) / 0.1 for k, v in first_moment(state).items()}
            for key, norm in norms.items():
                ours = np.linalg.norm(by_torch_key(cfg, gradient, key))
                assert ours == pytest.approx(norm, rel=1e-4, abs=1e-6), key
            total = np.sqrt(sum(norm**2 for norm in norms.values()))
            assert float(metrics["grad_norm"]) == pytest.approx(total, rel=1e-4)
        after = {k: np.asarray(v) for k, v in state.train.items()} if number == 2 else {}
        for key in [k for k in want if k.startswith(("grad.", "param_after3."))]:
            kind, torch_key = key.split(".", 1)
            if kind == "grad" and number == 0:
                ours = by_torch_key(cfg, gradient, torch_key)
                np.testing.assert_allclose(ours, want[key], atol=2e-5, err_msg=key)
            elif kind == "param_after3" and number == 2:
                ours = by_torch_key(cfg, after, torch_key)
                np.testing.assert_allclose(ours, want[key], atol=1e-4, err_msg=key)
    np.testing.assert_allclose(got, want["losses"], atol=1e-4)


MODEL = small_models.config("phi", MoeConfig(experts=2, aux_coef=0.1), layers=2)


@pytest.fixture(scope="module")
def params() -> dict[str, Any]:
    """Random parameters of MODEL."""
    return small_models.params(MODEL)


@pytest.fixture(scope="module")
def batch() -> dict[str, np.ndarray]:
    """Four rows with different numbers of labelled tokens."""
    return on_device(small_models.batch(MODEL, (1, 0, 0, 1)))


def test_frozen_parameters_are_left_alone(params: Any, batch: Any) -> None:
    """They are not written and own no optimiser state; everything else moves."""
    run = run_config(MODEL, ("llm/moe/(experts|meta)/.*",))
    tx, state, frozen = start(run, params)
    before = {k: np.asarray(v) for k, v in (state.train | frozen).items()}
    trained = set(state.train)
    assert {k.split("/")[2] for k in trained} == {"experts", "meta"}
    moments = [x for x in jax.tree.leaves(state.opt) if x.ndim]
    assert sum(x.size for x in moments) == 2 * sum(x.size for x in state.train.values())
    one = step.make_step(run, MODEL, tx)
    for _ in range(2):
        state, _ = one(state, frozen, batch)
    assert set(state.train) == trained and int(state.step) == 2
    for path, value in frozen.items():
        assert (np.asarray(value) == before[path]).all(), path
    for path, value in state.train.items():
        assert (np.asarray(value) != before[path]).mean() > 0.5, path


def test_accumulation_is_one_large_batch(batch: Any) -> None:
    """Two micro-batches with unlike numbers of labels give the mean over all labelled tokens."""
    assert (batch["labels"][::2] >= 0).sum() != (batch["labels"][1::2] >= 0).sum()
    model = small_models.config("stablelm", layers=1)
    results = []
    for parts in (1, 2):
        run = run_config(model, ("projector/.*", "llm/mlp/.*"))
        run = dataclasses.replace(run, optim=dataclasses.replace(SGD, accumulate=parts))
        tx, state, frozen = start(run, small_models.params(model))
        state, metrics = step.make_step(run, model, tx)(state, frozen, batch)
        results.append((metrics, first_moment(state)))
    (one, gradient), (two, gradients) = results
    for name in ("loss", "grad_norm", "tokens", "rows"):
        np.testing.assert_allclose(one[name], two[name], rtol=1e-5)
    assert one["rows"].shape == (4,) and int(one["tokens"]) == (batch["labels"][:, 1:] >= 0).sum()
    for path in gradient:
        np.testing.assert_allclose(gradient[path], gradients[path], atol=1e-7)


def test_clipping_is_by_the_norm_of_what_trains() -> None:
    """Whatever is frozen, the update is that of a gradient scaled to the norm."""
    flat = {"a": jnp.ones(3), "b": jnp.ones(4), "c": jnp.ones(5)}
    label = optim.labels(list(flat), ("a", "b"))
    train, frozen = optim.split(flat, label)
    grads = {"a": jnp.full(3, 3.0), "b": jnp.full(4, -1.0)}
    norm = float(jnp.sqrt(27.0 + 4.0))
    moments = []
    for clip, factor in ((0.0, 1.0), (2 * norm, 1.0), (norm / 4, 0.25)):
        tx = optim.make(dataclasses.replace(SGD, clip_norm=clip), 10, label)
        new, opt = optim.update(tx, grads, tx.init(flat), train, frozen)
        assert set(new) == {"a", "b"}
        moments.append(first_moment(step.State(jnp.zeros(()), train, opt)))
        np.testing.assert_allclose(moments[-1]["a"], 0.1 * 3.0 * factor, rtol=1e-5)


def test_biases_and_norms_do_not_decay() -> None:
    """As in transformers' Trainer. Without a gradient AdamW does nothing else."""
    names = ("fc/kernel", "fc/bias", "ln/scale", "embed/embedding", "frozen/kernel")
    flat = {name: jnp.full(3, 2.0) for name in names}
    label = optim.labels(list(flat), ("(fc|ln|embed)/.*",))
    tx = optim.make(dataclasses.replace(SGD, lr=0.5, weight_decay=0.1), 10, label)
    train, frozen = optim.split(flat, label)
    grads = jax.tree.map(jnp.zeros_like, train)
    new, _ = optim.update(tx, grads, tx.init(flat), train, frozen)
    moved = {name for name, value in new.items() if not np.array_equal(value, flat[name])}
    assert moved == {"fc/kernel", "embed/embedding"}
    np.testing.assert_allclose(new["fc/kernel"], 2.0 * (1 - 0.5 * 0.1), rtol=1e-6)


def test_a_step_computes_no_frozen_gradient(params: Any, batch: Any) -> None:
    """Clipping costs (almost) nothing when little trains; a norm over all leaves would not.

    Counted before the compiler removes what nobody reads.
    """
    flops = {}
    for name, train, clip in (
        ("little", ("projector/.*",), 0.0),
        ("little, clipped", ("projector/.*",), 1.0),
        ("all", (".*",), 1.0),
    ):
        run = run_config(MODEL, train, optim=dataclasses.replace(SGD, clip_norm=clip))
        tx, state, frozen = start(run, params)
        cost = step.make_step(run, MODEL, tx).lower(state, frozen, batch).cost_analysis()
        assert cost is not None
        flops[name] = cost["flops"]
    assert flops["little, clipped"] < 1.02 * flops["little"]
    assert flops["all"] > 1.25 * flops["little, clipped"]


def test_noise_is_new_at_every_step(batch: Any) -> None:
    """With `moe.noise` the second choices of two steps differ, though nothing has changed."""
    model = small_models.config("stablelm", MoeConfig(4, top_k=2, noise=True), layers=1)
    run = run_config(model, ("projector/.*",), optim=dataclasses.replace(SGD, lr=0.0))
    tx, state, frozen = start(run, small_models.params(model))
    one = step.make_step(run, model, tx)
    state, first = one(state, frozen, batch)
    state, second = one(state, frozen, batch)
    assert abs(float(first["loss"]) - float(second["loss"])) > 1e-3
    _, again, _ = start(run, small_models.params(model))
    assert float(one(again, frozen, batch)[1]["loss"]) == float(first["loss"])


def test_another_seed_takes_the_same_program(batch: Any) -> None:
    model = small_models.config("stablelm", MoeConfig(4, top_k=2, noise=True), layers=1)
    run = run_config(model, ("projector/.*",), optim=dataclasses.replace(SGD, lr=0.0))
    tx, state, frozen = start(run, small_models.params(model))
    one = step.make_step(run, model, tx)
    other = step.make_step(dataclasses.replace(run, seed=7), model, tx)
    texts = [f.lower(state, frozen, batch, np.uint32(7)).as_text() for f in (one, other)]
    assert texts[0] == texts[1]
    losses = []
    for seed in (0, 7):
        _, found = one(jax.tree.map(jnp.copy, state), frozen, batch, np.uint32(seed))
        losses.append(float(found["loss"]))
    _, meant = other(state, frozen, batch)
    assert abs(losses[0] - losses[1]) > 1e-3
    assert losses[1] == pytest.approx(float(meant["loss"]), rel=1e-6)  # fused otherwise


HALF = {"compute_dtype": "bfloat16", "remat": "full"}


def test_a_gradient_in_16_bits_is_the_one_in_32() -> None:
    """Bit for bit: it was computed in 16 bits and stored in 32."""
    rng = np.random.default_rng(0)
    weight = jnp.asarray(rng.normal(size=(3, 8, 8)).astype(np.float32))
    x = jnp.asarray(rng.normal(size=(5, 8)), jnp.bfloat16)

    def loss(kernels: Any) -> Any:
        def layer(x: Any, kernel: Any) -> tuple[Any, None]:
            return jnp.tanh(x @ layers.cast(kernel, x.dtype)), None

        return jax.lax.scan(layer, x, kernels)[0].astype(jnp.float32).sum()

    want = jax.grad(loss)(weight)
    shadow = jnp.zeros(weight.shape, jnp.bfloat16)
    have = jax.grad(lambda shadow: loss(layers.Master(weight, shadow)))(shadow)
    assert have.dtype == jnp.bfloat16
    np.testing.assert_array_equal(have.astype(jnp.float32), want)


def test_every_gradient_of_a_step_in_16_bits(params: Any, batch: Any) -> None:
    """Beside those of the loss, in another program, which rounds elsewhere: numbers of 16 bits are
    right to one part in 256."""
    cfg = dataclasses.replace(SGD, accumulate=2)
    run = run_config(MODEL, ("llm/.*", "projector/.*"), optim=cfg, **HALF)
    tx, state, frozen = start(run, params)
    flat = state.train | frozen

    def loss(train: dict[str, Any]) -> Any:
        return step.forward_loss(run, MODEL, flat | train, batch).rows.sum()

    count = (batch["labels"] != -100).sum()
    want = {k: v / count for k, v in jax.jit(jax.grad(loss))(state.train).items()}
    state, metrics = step.make_step(run, MODEL, tx)(state, frozen, batch)
    have = first_moment(state)
    assert have.keys() == want.keys()
    for path in filter(lora.is_matrix, want):
        error = jnp.linalg.norm(have[path] / 0.1 - want[path]) / jnp.linalg.norm(want[path])
        assert error < 2**-7, path
    norm = np.sqrt(sum(float(jnp.square(value).sum()) for value in want.values()))
    np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-2)


def test_no_gradient_of_all_layers_is_in_32_bits(params: Any, batch: Any) -> None:
    run = run_config(MODEL, ("llm/moe/(experts|meta)/.*",), **HALF)
    tx, state, frozen = start(run, params)
    shapes = {v.shape for k, v in state.train.items() if k.endswith("/kernel")}
    found = set()

    def look(jaxpr: Any) -> None:
        for eqn in jaxpr.eqns:
            if eqn.primitive.name == "scan":
                found.update((v.aval.shape, v.aval.dtype.name) for v in eqn.outvars)
            for sub in jax.extend.core.jaxprs_in_params(eqn.params):
                look(sub)

    look(jax.make_jaxpr(step.make_step(run, MODEL, tx))(state, frozen, batch).jaxpr)
    for shape in shapes:
        assert (shape, "bfloat16") in found and (shape, "float32") not in found


def test_router_phase_trains_the_router_alone(params: Any, batch: Any) -> None:
    """In bfloat16 with everything recomputed, as on a large model; the loss falls."""
    dense = dataclasses.replace(MODEL, moe=None)
    llm = {k: v for k, v in small_models.params(dense)["llm"].items()}
    router = jax.tree.map(lambda a: a[0], params["llm"]["moe"]["router"])
    run = run_config(
        MODEL,
        ("router/.*",),
        objective="router",
        compute_dtype="bfloat16",
        remat="full",
        optim=dataclasses.replace(SGD, lr=1e-2),
    )
    tx, state, frozen = start(run, params | {"llm": llm, "router": router})
    assert set(state.train) == {"router/fc1/kernel", "router/fc1/bias"}
    one = step.make_step(run, dense, tx)
    modality = np.array([0, 1, 1, -1], np.int32)
    found = []
    for _ in range(12):
        state, metrics = one(state, frozen, batch | {"modality": modality})
        found.append(float(metrics["loss"]))
    assert int(metrics["tokens"]) == batch["mask"][:3].sum() * len(MODEL.moe_layers)
    assert found[-1] < 0.8 * found[0]


def test_router_phase_reads_layers_of_the_model_that_runs(params: Any, batch: Any) -> None:
    """And not those of config.model, which may name another size: only its mixture counts."""
    dense = dataclasses.replace(MODEL, moe=None)
    router = jax.tree.map(lambda a: a[0], params["llm"]["moe"]["router"])
    flat = flatten_dict(small_models.params(dense) | {"router": router}, sep="/")
    losses = []
    for more in (0, 1):
        llm = dataclasses.replace(MODEL.llm, layers=MODEL.llm.layers + more)
        asked = dataclasses.replace(MODEL, llm=llm)
        run = run_config(asked, ("router/.*",), objective="router")
        losses.append(step.forward_loss(run, dense, flat, batch))
    assert losses[0].counts.tolist() == losses[1].counts.tolist()
    np.testing.assert_array_equal(losses[0].rows, losses[1].rows)


def test_unknown_objective(params: Any, batch: Any) -> None:
    run = run_config(MODEL, (".*",), objective="sing")
    flat = flatten_dict(params, sep="/")
    with pytest.raises(ConfigError, match="objective 'sing' is unknown; use 'answer' or 'router'"):
        jax.eval_shape(lambda f, b: step.forward_loss(run, MODEL, f, b), flat, batch)


def test_labels() -> None:
    paths = ["llm/mlp/fc1/kernel", "llm/moe/meta/fc1/kernel", "projector/fc0/bias"]
    label = optim.labels(paths, ("llm/mlp/.*", "projector/.*"))
    assert [label[p] for p in paths] == ["train", "frozen", "train"]
    with pytest.raises(ConfigError, match=r"'projektor/\.\*' matches no parameter"):
        optim.labels(paths, ("llm/.*", "projektor/.*"))
    with pytest.raises(ConfigError, match="'llm/mlp' matches no parameter"):  # the whole path
        optim.labels(paths, ("llm/mlp",))
    with pytest.raises(ConfigError, match="nothing would train"):
        optim.labels(paths, ())
    flat = {p: np.zeros((2, n + 1), np.float32) for n, p in enumerate(paths)}
    report = optim.group_table(flat, label).splitlines()
    assert len(report) == 4 and report[0].split()[0] == "parameters"
    assert report[2].split() == ["llm/moe/meta", "float32", "-", "frozen", "1", "4"]


@pytest.mark.parametrize(("warmup", "steps"), [(0.03, 100), (0.03, 7), (0.0, 20), (0.5, 3)])
def test_schedule_is_that_of_transformers(warmup: float, steps: int) -> None:
    torch = pytest.importorskip("torch", reason="needs the extra medmoe_jax[torch]")
    from transformers import get_cosine_schedule_with_warmup

    optimiser = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2e-5)
    rise = int(np.ceil(warmup * steps))
    theirs = get_cosine_schedule_with_warmup(optimiser, rise, steps)
    ours = optim.schedule(OptimConfig(lr=2e-5, warmup=warmup), steps)
    for number in range(steps + 1):
        want = theirs.get_last_lr()[0]
        assert float(ours(number)) == pytest.approx(want, rel=1e-5, abs=1e-11), number
        optimiser.step()
        theirs.step()


def test_constant_and_unknown_schedule() -> None:
    constant = optim.schedule(OptimConfig(lr=1.0, warmup=0.5, schedule="constant"), 4)
    assert [float(constant(n)) for n in range(5)] == [0.0, 0.5, 1.0, 1.0, 1.0]
    with pytest.raises(ConfigError, match="'linear' is unknown; use 'cosine' or 'constant'"):
        optim.schedule(OptimConfig(schedule="linear"), 4)


def test_the_norm_is_that_of_all_numbers() -> None:
    """Also slice by slice, as on a CPU, and of leaves of any rank."""
    rng = np.random.default_rng(0)
    tree = {"a": rng.normal(size=(3, 4, 5)), "b": rng.normal(size=7), "c": np.float64(2.0)}
    want = np.sqrt(sum(np.square(leaf).sum() for leaf in tree.values()))
    found = jax.jit(optim.norm)(jax.tree.map(jnp.float32, tree))
    np.testing.assert_allclose(found, want, rtol=1e-6)
