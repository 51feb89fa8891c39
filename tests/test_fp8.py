"""Products of 8-bit values: the rounding against its closed form, rows without magnitude or with a lot, refusals.

On a CPU the rounded values are those of a GPU, and their product is wider: what is tested is the rounding.
"""

import runpy
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from mige import fp8
from mige.fp8 import E4M3, LARGEST, Fp8Linear, Rounded, round_rows

HALF_ULP = 2.0**-4  # of a value: three bits after the leading one
SUBNORMAL = 2.0**-10  # of the scale: half of the smallest e4m3 value


@pytest.fixture(autouse=True)
def uncompiled():
    """The same arithmetic without the compiler, which takes seconds for every new shape."""
    with torch.compiler.set_stance("force_eager"):
        yield


def normal(*size, seed=0, spread=0.0):
    """Random values; with a spread, of magnitudes some powers of ten apart."""
    random = torch.Generator().manual_seed(seed)
    return torch.randn(*size, generator=random) * 10 ** (spread * torch.randn(*size, generator=random))


def layer(weight, bias=None) -> torch.nn.Linear:
    made = torch.nn.Linear(*reversed(weight.shape))
    made.weight.data, made.bias.data = weight, torch.zeros(len(weight)) if bias is None else bias
    return made


def bound(x, scale):
    """The most that rounding can change each value, float64."""
    return torch.maximum(HALF_ULP * x.double().abs(), SUBNORMAL * scale.double()) * (1 + 1e-6)  # the quotient's own


@pytest.mark.parametrize("spread", [0.0, 2.0])
@pytest.mark.parametrize("magnitude", [1.0, 1e-30, 1e30])
def test_a_value_is_off_by_half_a_step_at_most(spread, magnitude):
    x = normal(50, 96, spread=spread) * magnitude
    values, scale = round_rows(x)
    assert values.dtype == E4M3 and values.shape == x.shape and values.is_contiguous()
    assert scale.dtype == torch.float32 and scale.shape == (50, 1) and scale.is_contiguous()
    assert (values.float().abs().amax(1) == LARGEST).all()  # the format's whole range is used
    off = (values.double() * scale.double() - x.double()).abs()
    assert (off <= bound(x, scale)).all()
    assert (off / x.double().abs()).median() > HALF_ULP / 8  # and rounded they are


@pytest.mark.parametrize("spread", [0.0, 2.0])
def test_a_product_is_off_by_its_factors_rounding_at_most(spread):
    x, weights = (
        normal(20, 96, seed=1, spread=spread),
        [normal(rows, 96, seed=rows, spread=spread) for rows in (16, 32)],
    )
    bias = normal(48)
    product = Fp8Linear.of(*(layer(w, b) for w, b in zip(weights, bias.split((16, 32)), strict=True)))
    weight = torch.cat(weights)
    dx, dw = bound(x, round_rows(x)[1]), bound(weight, product.scale.t())
    most = x.double().abs() @ dw.t() + dx @ (weight.double().abs() + dw).t()
    want = F.linear(x.double(), weight.double(), bias.double())
    off = (product(x).double() - want).abs()
    assert (off <= most + 1e-5 * (x.double().abs() @ weight.double().abs().t() + 1)).all()  # sums are float32
    assert 0.001 < off.norm() / want.norm() < HALF_ULP


def test_what_the_format_holds_is_exact():
    """Small integers beside a 448 have a scale of one, or of any power of two that they are multiplied with."""
    random = torch.Generator().manual_seed(0)
    x, weight = (torch.randint(-16, 17, (rows, 32), generator=random).float() for rows in (8, 16))
    x[:, 3], weight[:, 5] = LARGEST, -LARGEST
    x *= 2.0 ** torch.arange(-4, 4)[:, None]
    weight *= 2.0 ** torch.arange(-8, 8)[:, None]
    bias = torch.arange(16).float()
    got = Fp8Linear.of(layer(weight, bias))(x)
    assert torch.equal(got.double(), F.linear(x.double(), weight.double(), bias.double()))


def test_rows_of_zeros_and_of_the_smallest_and_the_largest_numbers():
    limits = torch.finfo(torch.float32)
    x = normal(5, 32)
    x[0], x[1], x[2, 7], x[3] = 0, limits.max, 1e30, limits.smallest_normal / 1000
    weight, bias = normal(16, 32, seed=1), normal(16, seed=2)
    weight[4] = 0
    values, scale = round_rows(x)
    assert values.float().isfinite().all() and scale.isfinite().all() and (scale > 0).all()
    assert (values[0].float() == 0).all() and (values[1].float() == LARGEST).all()
    got, want = Fp8Linear.of(layer(weight, bias))(x), F.linear(x.double(), weight.double(), bias.double())
    assert torch.equal(got[0], bias) and torch.equal(got[3], bias)
    assert (got[[0, 2, 3, 4], 4] == bias[4]).all()
    others = [column for column in range(16) if column != 4]
    assert ((got[2].double() - want[2]).abs() <= 2.1 * HALF_ULP * want[2].abs())[others].all()  # its one value rules
    alone = Fp8Linear.of(layer(weight, bias))(x[4:])
    assert torch.equal(got[4:], alone)  # no row feels another


def check_gelu():
    first, second = (Fp8Linear.of(layer(normal(*size, seed=size[0]) / 8)) for size in ((96, 48), (48, 96)))
    x = normal(24, 48)
    between = first.gelu(x)
    assert isinstance(between, Rounded) and between.values.dtype == E4M3
    want = second(F.gelu(first(x), approximate="tanh"))
    assert (second(between) - want).norm() < 1e-3 * want.norm()  # a value on the border may fall to the other side


def test_gelu_is_taken_before_the_rounding():
    check_gelu()


def test_compiled_it_rounds_alike():
    x = normal(40, 48, seed=3)
    x[5] = 0
    with torch.compiler.set_stance("default"):
        check_gelu()
        values, scale = round_rows(x)
    want, want_scale = fp8._round_rows(x)
    assert torch.equal(scale, want_scale) and values.stride() == want.stride()
    assert (values.float() != want.float()).float().mean() < 0.001


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_output_has_the_dtype_of_the_weights(dtype):
    product = Fp8Linear.of(layer(normal(16, 32), normal(16)).to(dtype))
    got = product(normal(8, 32).to(dtype))
    assert got.dtype == dtype and got.shape == (8, 16)
    assert product.weight.dtype == E4M3 and product.weight.is_contiguous()
    assert product.scale.shape == (1, 16) and product.scale.is_contiguous() and product.scale.stride(1) == 1


# ---- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(16, 40), (24, 32)])
def test_widths_off_the_kernels_grid_are_refused(shape):
    with pytest.raises(ValueError, match=rf"fp8: widths must be multiples of 16, got a weight of \[{shape[0]}, "):
        Fp8Linear.of(layer(normal(*shape)))


def test_gpus_and_precisions_that_cannot_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(ValueError, match=r"fp8: NVIDIA A100 has no 8-bit products, which need .* 8\.9"):
        fp8.require(torch.device("cuda"), torch.bfloat16)
    with pytest.raises(ValueError, match="fp8: mps has no 8-bit products"):
        fp8.require(torch.device("mps"), torch.bfloat16)
    for capability in ((8, 9), (9, 0), (10, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, known=capability: known)
        fp8.require(torch.device("cuda"), torch.bfloat16)
        with pytest.raises(ValueError, match=r"need a model in bfloat16, got torch\.float32"):
            fp8.require(torch.device("cuda"), torch.float32)
    fp8.require(torch.device("cpu"), torch.float32)


def test_the_command_line_wants_the_fast_mode(monkeypatch, capsys):
    script = runpy.run_path(str(Path(__file__).parent.parent / "infer_scripts" / "infer.py"))
    arguments = ["infer.py", "--model", "x", "--prompt", "a cat", "--device", "cpu", "--fp8"]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit):
        script["parse"]()
    assert "--fp8 needs --compile" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", [*arguments, "--compile"])
    assert script["parse"]().fp8
