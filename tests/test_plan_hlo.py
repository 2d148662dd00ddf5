"""What is read from HLO, against arithmetic: compiled programs, and lines as TPUs and GPUs have
them."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import pytest
import small_models

from medmoe_jax import flops, layout, optim, sharding, step
from medmoe_jax.config import MeshConfig, OptimConfig, RunConfig
from medmoe_jax.models import grouped, layers
from medmoe_jax.plan import hlo


def compiled(fn: Any, *shapes: tuple[int, ...]) -> hlo.Work:
    """The work of `fn` on float32 arrays."""
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return hlo.work(jax.jit(fn).lower(*arguments).compile().as_text())


def test_loops_count_as_often_as_they_run() -> None:
    """A scan of 5 products within a scan of 3; the weights of each round are read once."""

    def outer(x: Any, weights: Any) -> Any:
        def body(x: Any, _: Any) -> tuple[Any, None]:
            return jax.lax.scan(lambda y, w: (jnp.tanh(y @ w), None), x, weights)[0], None

        return jax.lax.scan(body, x, None, length=3)[0]

    found = compiled(outer, (64, 128), (5, 128, 128))
    assert found.flops == 3 * 5 * 2 * 64 * 128 * 128
    assert found.endless == 0 and not found.collectives and not found.kernels
    # The products read 5 matrices in each of 3 rounds and 15 times an activation.
    least = 15 * 4 * (128 * 128 + 2 * 64 * 128)
    assert least <= found.traffic <= 3 * least


def test_batched_products_and_elementwise_work() -> None:
    found = compiled(lambda a, b: jnp.einsum("bij,bkj->bik", a, b) + 1, (7, 24, 40), (7, 56, 40))
    assert found.flops == 2 * 7 * 24 * 56 * 40
    assert compiled(lambda a: a * 2 + 1, (1000, 1000)).traffic == 2 * 4e6


def test_branches_and_loops_of_unknown_length() -> None:
    def branch(x: Any, w: Any) -> Any:
        some = [lambda y: y, lambda y: y @ w, lambda y: y @ w @ w]
        return jax.lax.switch(x[0, 0].astype(int), some, x)

    assert compiled(branch, (64, 128), (128, 128)).flops == 2 * 2 * 64 * 128 * 128

    def loop(x: Any, w: Any) -> Any:
        return jax.lax.while_loop(lambda y: y.sum() < 1, lambda y: y @ w, x)

    found = compiled(loop, (64, 128), (128, 128))
    assert found.endless == 1 and found.flops == 2 * 64 * 128 * 128


def test_experts_that_nobody_chose_do_nothing() -> None:
    """Three tokens, each expert with room for all of them; the branch of none only returns."""
    shapes = layers.mlp_leaves("stablelm", 32, 48, (4,))
    p = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.float32),
        shapes,
        is_leaf=lambda leaf: isinstance(leaf, layers.Leaf),
    )
    x, weight = (jax.ShapeDtypeStruct((1, 3, n), jnp.float32) for n in (32, 1))
    choice = jax.ShapeDtypeStruct((1, 3, 1), jnp.int32)
    run = jax.jit(grouped.grouped, static_argnums=4)
    text = run.lower(p, x, choice, weight, 4).compile().as_text()
    all_four, one = hlo.work(text), hlo.work(text, chosen=0.25)
    assert all_four.flops == 4 * 3 * 2 * 3 * 32 * 48
    assert one.flops == all_four.flops / 4
    weights = 4 * 3 * 32 * 48  # bytes of an expert
    assert 3 * weights <= all_four.traffic - one.traffic < 5 * weights  # and activations


def test_a_step_is_its_model_flops() -> None:
    """XLA's products of a dense step are those of `flops.costs`, with the whole square of
    attention, which the CPU computes."""
    model = small_models.config("stablelm", layers=2)
    cfg = RunConfig(
        model=model, train=("projector/.*", "llm/.*"), compute_dtype="float32",
        frozen_dtype="float32", remat="none", loss_chunk=0, optim=OptimConfig(batch_size=3),
    )  # fmt: skip
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    label = optim.labels(list(layout.shapes(cfg)), cfg.train)
    tx = optim.make(cfg.optim, 10, label)
    train, frozen = layout.abstract_weights(cfg, layout.shapes(cfg), label, mesh)
    state = layout.abstract_state(tx, train, frozen, mesh)
    batch = layout.abstract_batch(cfg, mesh, length=20, images=1)
    program = step.make_step(cfg, model, tx, state).lower(state, frozen, batch).compile()
    unit = flops.costs(cfg, model, label)
    want = unit.token * 3 * 20 + unit.pair * 3 * 20 * 20 + unit.image * 3
    assert hlo.work(program.as_text()).flops == pytest.approx(want, rel=0.02)


def module(*lines: str, computations: str = "", partitions: int = 8) -> str:
    """A module whose first computation has these lines."""
    body = "\n".join(f"  {line}" for line in lines)
    return (
        f"HloModule m, num_partitions={partitions}\n\n{computations}\n"
        f"ENTRY %main (p: f32[1]) -> f32[1] {{\n{body}\n}}\n"
    )


X = "%x = f32[16,100]{1,0:T(8,128)} parameter(0)"  # 6,400 bytes


@pytest.mark.parametrize(
    ("line", "kind", "sent"),
    [
        ("f32[64,100] all-gather(%x), replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}",
         "all-gather", 3 * 6400),
        ("f32[32,100] all-gather(%x), replica_groups=[4,2]<=[2,4]T(1,0), dimensions={0}",
         "all-gather", 6400),
        ("f32[128,100] all-gather(%x), replica_groups=mesh['a'=2,'b'=4] {'a','b'}, dimensions={0}",
         "all-gather", 7 * 6400),
        ("(f32[16,100], f32[64,100]) all-gather-start(%x), replica_groups=mesh['a'=2,'b'=4] {'b'}",
         "all-gather", 3 * 6400),
        ("f32[16,100] all-reduce(%x), replica_groups={}, to_apply=%add",
         "all-reduce", 2 * 7 / 8 * 6400),
        ("f32[4,100] reduce-scatter(%x), replica_groups=[2,4]<=[8], dimensions={0}, to_apply=%add",
         "reduce-scatter", 3 / 4 * 6400),
        ("f32[16,100] all-to-all(%x), replica_groups=[4,2]<=[8], dimensions={0}",
         "all-to-all", 1 / 2 * 6400),
        ("f32[16,100] collective-permute(%x), source_target_pairs={{0,1},{1,0}}",
         "collective-permute", 6400),
    ],
)  # fmt: skip
def test_bytes_that_a_device_sends(line: str, kind: str, sent: float) -> None:
    """n - 1 of n parts in a ring; a sum is scattered and gathered."""
    found = hlo.work(module(X, f"ROOT %y = {line}")).collectives
    assert set(found) == {kind}
    assert found[kind].count == 1 and found[kind].sent == pytest.approx(sent)


def test_devices_that_are_alone_send_nothing() -> None:
    line = "ROOT %y = f32[16,100] all-reduce(%x), replica_groups={{0},{1}}, to_apply=%add"
    assert not hlo.work(module(X, line)).collectives


def test_a_collective_behind_products_counts_once() -> None:
    """A TPU writes it into the fusion that starts it, into that beside it and into the last. What
    is to be gathered lies in the chip's own memory; the whole goes from hand to hand."""
    part, whole = "f32[16,100]{1,0:S(1)}", "f32[64,100]"
    gather = f"  %g = {whole} all-gather(%q), channel_id=7, replica_groups=[2,4]<=[8]\n"
    given = f"  %q = {part} parameter(0)\n  %r = {whole} parameter(1)\n{gather}"
    both, three = f"({part}, {whole})", f"({part}, {whole}, {whole})"
    parts = f"%first (q: {part}) -> {both} {{\n  %q = {part} parameter(0)\n{gather}"
    parts += f'  ROOT %c = {both} custom-call(%g), custom_call_target="AsyncCollectiveStart"\n}}\n'
    parts += f"%beside (q: {part}, r: {whole}) -> {three} {{\n{given}"
    parts += f"  ROOT %t = {three} tuple(%q, %r, %g)\n}}\n"
    parts += f"%last (q: {part}, r: {whole}) -> {whole} {{\n{given}  ROOT %c = {whole} "
    parts += 'custom-call(%q, %r, %g), custom_call_target="AsyncCollectiveDone"\n}\n'
    lines = [f"%x = {part} parameter(0)",
             f"%a = {both} fusion(%x), kind=kCustom, calls=%first",
             f"%b = {whole} get-tuple-element(%a), index=1",
             f"%c = {three} fusion(%x, %b), kind=kOutput, calls=%beside",
             f"%d = {whole} get-tuple-element(%c), index=2",
             f"ROOT %y = {whole} fusion(%x, %d), kind=kCustom, calls=%last"]  # fmt: skip
    found = hlo.work(module(*lines, computations=parts))
    assert found.collectives["all-gather"].count == 1
    assert found.collectives["all-gather"].sent == 3 * 6400
    assert found.traffic == 4 * 6400


@pytest.mark.parametrize(
    ("shapes", "line", "want"),
    [
        # x[32, 64] w[64, 48] as TPUs write it
        ("f32[32,64] f32[64,48]", "f32[32,48] convolution(%a, %b), dim_labels=bf_io->bf",
         2 * 32 * 64 * 48),
        # a batch of 6 products [8, 16] x [8, 24] over 8, the batch a window with holes
        ("f32[6,8,16] f32[6,8,24]",
         "f32[6,16,24] convolution(%a, %b), window={size=6 stride=5 lhs_dilate=6}, "
         "dim_labels=0fb_0io->0bf", 2 * 6 * 8 * 16 * 24),
        # 3 x 3 on 10 x 10 with a border: at the rim the window hits nothing
        ("f32[2,10,10,4] f32[3,3,4,5]",
         "f32[2,10,10,5] convolution(%a, %b), window={size=3x3 pad=1_1x1_1}, "
         "dim_labels=b01f_01io->b01f", 2 * 2 * 4 * 5 * 28 * 28),
        # patches of 7 x 7
        ("f32[2,14,14,3] f32[7,7,3,8]",
         "f32[2,2,2,8] convolution(%a, %b), window={size=7x7 stride=7x7}, "
         "dim_labels=b01f_01io->b01f", 2 * 2 * 2 * 2 * 8 * 7 * 7 * 3),
        ("f32[32,64] f32[64,48]",
         '(f32[32,48], s8[99]) custom-call(%a, %b), custom_call_target="__cublas$gemm", '
         'backend_config={"gemm_backend_config":{"dot_dimension_numbers":{'
         '"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"]}}}',
         2 * 32 * 64 * 48),
        ("bf16[2,128,4,64] bf16[2,128,4,64]",
         '(bf16[2,4,128,64], u8[0]) custom-call(%a, %b, %b), custom_call_target='
         '"__cudnn$fmhaSoftmax", backend_config={"cudnn_fmha_backend_config":{"mask_type":'
         '"CAUSAL","intermediate_tensor_shape":{"element_type":"BF16","dimensions":'
         '["2","4","128","128"]}}}', 2 * 2 * (2 * 4 * 128 * 128 * 64) / 2),
        ("bf16[9,9] bf16[9,9]",
         'bf16[9,9] custom-call(%a, %b), custom_call_target="tpu_custom_call", backend_config={'
         '"custom_call_config":{"cost_estimate":{"flops":"1234","transcendentals":"0"}}}', 1234),
        # 2 rows of 3 heads, 512 places in 4 blocks: 10 of 16 pairs of blocks are computed
        ("s8[1,4,4] bf16[2,3,512,80]",
         'bf16[2,3,512,80] custom-call(%a, %b, %b, %b), custom_call_target="tpu_custom_call", '
         'metadata={op_name="x/splash_mha_fwd_segmented/pallas_call"}',
         2 * 2 * (2 * 3 * 10 * 128 * 128 * 80)),
        ("s8[1,1,1] f32[3,128,64]",
         'f32[3,128,64] custom-call(%a, %b, %b, %b), custom_call_target="tpu_custom_call", '
         'metadata={op_name="x/splash_mha_dkv_segmented/pallas_call"}',
         4 * 2 * (3 * 128 * 128 * 64)),
    ],
)  # fmt: skip
def test_products_of_other_backends(shapes: str, line: str, want: float) -> None:
    a, b = shapes.split()
    given = (f"%a = {a} parameter(0)", f"%b = {b} parameter(1)")
    found = hlo.work(module(*given, f"ROOT %y = {line}"))
    assert found.flops == want and not found.kernels


def test_kernels_that_do_not_say_what_they_compute_are_named() -> None:
    body = "%b (q: s32[]) -> s32[] {\n  %q = s32[] parameter(0)\n  %k = f32[2] custom-call(%q), "
    body += 'custom_call_target="tpu_custom_call", backend_config={}\n}\n'
    loop = (
        '%w = s32[] while(%x), condition=%c, body=%b, backend_config={"known_trip_count":{"n":"6"}}'
    )
    found = hlo.work(module("%x = s32[] parameter(0)", loop, computations=body))
    assert found.kernels == {"tpu_custom_call": 6} and found.flops == 0


def test_memory_on_the_chip_is_no_traffic() -> None:
    """S(1) is a TPU's vector memory."""
    line = "ROOT %y = f32[16,100]{1,0:T(8,128)S(1)} negate(%x)"
    assert hlo.work(module(X, line)).traffic == 6400


def test_what_is_fetched_ahead_moves_once() -> None:
    """A TPU copies an array, or a part of it, into its own memory while it computes."""
    copy = "%c = (f32[16,100]{1,0:S(1)}, f32[16,100], u32[]) copy-start(%x)"
    assert hlo.work(module(X, copy)).traffic == 6400
    part = (
        "%s = ((f32[16,100]), f32[4,100]{1,0:S(1)}, u32[]) slice-start(%x), slice={[0:4], [0:100]}"
    )
    assert hlo.work(module(X, part)).traffic == 1600


def test_slices_move_what_they_take() -> None:
    """Of a stack of weights one layer is read, and one gradient is written into its stack."""
    head = "(p: f32[8,16,100], i: s32[]) -> f32[16,100] {\n  %p = f32[8,16,100] parameter(0)\n"
    read = head + "  %i = s32[] parameter(1)\n  ROOT %s = f32[1,16,100] dynamic-slice(%p, %i)\n}\n"
    write = (
        head.replace("i: s32[]", "u: f32[1,16,100]")
        + "  %u = f32[1,16,100] parameter(1)\n  %i = s32[] constant(0)\n"
        + "  ROOT %s = f32[8,16,100] dynamic-update-slice(%p, %u, %i)\n}\n"
    )
    stack, one = "%x = f32[8,16,100] parameter(0)", "%u = f32[1,16,100] parameter(1)"
    line = "%y = f32[1,16,100] fusion(%x, %i), kind=kLoop, calls=%f"
    found = hlo.work(module(stack, "%i = s32[] parameter(1)", line, computations="%f " + read))
    assert found.traffic == pytest.approx(2 * 6400, abs=8)
    line = "%y = f32[8,16,100] fusion(%x, %u), kind=kLoop, calls=%f"
    assert hlo.work(module(stack, one, line, computations="%f " + write)).traffic == 2 * 6400


def test_a_kernel_that_describes_itself_over_several_lines() -> None:
    """What comes behind it still belongs to the program, and its FLOPs are read."""
    kernel = '%k = f32[16,100] custom-call(%x), custom_call_target="tpu_custom_call", config={'
    kernel += '"note": "a\n}}, b", "cost_estimate":{"flops":"77","transcendentals":"0"}\n}}'
    product = "ROOT %y = f32[16,16] dot(%k, %k), lhs_contracting_dims={1}, rhs_contracting_dims={1}"
    assert hlo.work(module(X, kernel, product)).flops == 77 + 2 * 16 * 16 * 100


@pytest.mark.parametrize("dtype", ["s32", "u32"])
def test_loops_whose_rounds_are_in_their_condition(dtype: str) -> None:
    """TPUs do not note the number of rounds; a product beside a gather counts in u32."""
    body = f"%c (q: {dtype}[]) -> pred[] {{\n  %n = {dtype}[] constant(4)\n"
    body += f"  %q = {dtype}[] parameter(0)\n"
    body += "  ROOT %l = pred[] compare(%q, %n), direction=LT\n}\n\n"
    body += f"%b (p: {dtype}[]) -> {dtype}[] {{\n  %a = f32[8,8] iota()\n"
    body += "  %d = f32[8,8] dot(%a, %a), lhs_contracting_dims={1}, rhs_contracting_dims={0}\n}\n"
    loop = f"ROOT %w = {dtype}[] while(%x), condition=%c, body=%b"
    found = hlo.work(module(f"%x = {dtype}[] parameter(0)", loop, computations=body))
    assert found.flops == 4 * 2 * 8**3 and not found.endless


def test_unrolled_loops_count_in_steps() -> None:
    """A product beside a gather is done for two shards in a round, and counts them."""
    state = "(u32[], f32[8,8])"
    part = "  %p = (u32[], f32[8,8]) parameter(0)\n  %i = u32[] get-tuple-element(%p), index=0\n"
    body = f"%c (p: {state}) -> pred[] {{\n{part}  %n = u32[] constant(7)\n"
    body += "  ROOT %l = pred[] compare(%i, %n), direction=LT\n}\n\n"
    body += f"%b (p: {state}) -> {state} {{\n{part}  %two = u32[] constant(2)\n"
    body += "  %a = f32[8,8] get-tuple-element(%p), index=1\n  %j = u32[] add(%i, %two)\n"
    body += "  %d = f32[8,8] dot(%a, %a), lhs_contracting_dims={1}, rhs_contracting_dims={0}\n"
    body += f"  %k = u32[] copy(%j)\n  ROOT %t = {state} tuple(%k, %d)\n}}\n"
    loop = f"ROOT %w = {state} while(%x), condition=%c, body=%b"
    found = hlo.work(module(f"%x = {state} parameter(0)", loop, computations=body))
    assert found.flops == 4 * 2 * 8**3 and not found.endless


def test_grouped_products_skip_rows_that_no_expert_owns() -> None:
    """The kernel declares FLOPs for all rows that there is room for."""
    line = 'ROOT %y = f32[16,100] custom-call(%x), custom_call_target="tpu_custom_call", '
    line += 'metadata={op_name="moe/jit(gmm)/pallas_call"}, backend_config={"custom_call_config":'
    line += '{"cost_estimate":{"flops":"400","transcendentals":"0"}}}'
    assert hlo.work(module(X, line), filled=0.25).flops == 100
    assert hlo.work(module(X, line.replace("gmm", "other")), filled=0.25).flops == 400


def test_a_product_of_one_of_the_experts() -> None:
    """As in generation: of the rows of four experts it visits those of one, and so of the result,
    in which the rows of others stay what they are."""
    given = ("%n = s32[] parameter(0)", "%o = s32[1] parameter(1)", "%r = f32[64,8] parameter(2)",
             "%w = f32[8,16] parameter(3)", "%y = f32[64,16] parameter(4)")  # fmt: skip
    line = "ROOT %z = f32[64,16] custom-call(%n, %o, %r, %w, %y), custom_call_target="
    line += '"tpu_custom_call", metadata={op_name="jit(f)/product_of_one_expert/pallas_call"}, '
    line += f'backend_config={{"cost_estimate":{{"flops":"{2 * 16 * 8 * 16}"}}}}'
    found = hlo.work(module(*given, line), filled=0.5)
    assert found.flops == 16 * 8 * 16
    assert found.traffic == 4 * (8 * 16 + 16 * 8 + 16 * 16)


@pytest.mark.parametrize(
    ("shapes", "out", "name", "want"),
    [
        ("bf16[256,32] bf16[4,32,48]", "bf16[256,48]", "grouped_product", 2 * 256 * 32 * 48),
        ("bf16[256,32] bf16[256,48]", "bf16[4,32,48]", "grouped_product_of_weights",
         2 * 256 * 32 * 48),
    ],
)  # fmt: skip
def test_grouped_products_of_a_gpu(shapes: str, out: str, name: str, want: float) -> None:
    """Of rows with matrices, and of rows with gradients of rows."""
    a, b = shapes.split()
    given = "%s = s32[2] parameter(0)", f"%a = {a} parameter(1)", f"%b = {b} parameter(2)"
    line = f"ROOT %y = {out} custom-call(%s, %a, %b), custom_call_target="
    line += f'"__gpu$xla.gpu.triton", metadata={{op_name="jit(f)/{name}/pallas_call"}}'
    found = hlo.work(module(*given, line))
    assert found.flops == want and not found.kernels


def test_products_with_matrices_of_4_bits_on_a_gpu() -> None:
    """All inputs of all rows count, whatever part of them a program takes."""
    given = ("%x = bf16[16,128] parameter(0)", "%v = s8[4,16,48] parameter(1)",
             "%s = f32[4,48] parameter(2)")  # fmt: skip
    line = "ROOT %y = f32[2,16,48] custom-call(%x, %v, %s), custom_call_target="
    line += '"__gpu$xla.gpu.triton", metadata={op_name="jit(f)/product_of_int4/pallas_call"}'
    found = hlo.work(module(*given, line))
    assert found.flops == 2 * 16 * 128 * 48 and not found.kernels
