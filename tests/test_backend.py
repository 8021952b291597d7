"""torch.compile(model, backend="moefx") on CPU; the emitted kernels behind it run in ``interpreted_backend.py``."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn

import moefx.backend
from moefx.errors import OptionError
from tests.inductor import linkable
from tests.routed_toy import RoutedFFN


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch.manual_seed(0)
    torch.compiler.reset()


def graphs_compiled() -> int:
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])


@linkable
def test_forward_and_gradients_equal_eager_at_several_batch_sizes() -> None:
    model = RoutedFFN()
    compiled = torch.compile(model, backend="moefx", fullgraph=True, dynamic=True)
    before = graphs_compiled()
    for batch in (2, 3, 5):
        x = torch.randn(batch, 9, 24, requires_grad=True)
        got, want = compiled(x), model(x)
        torch.testing.assert_close(got, want)
        leaves = [x, *model.parameters()]
        torch.testing.assert_close(
            torch.autograd.grad(got.square().mean(), leaves), torch.autograd.grad(want.square().mean(), leaves)
        )
    assert graphs_compiled() - before == 1


@pytest.mark.parametrize("inner", ["aot_eager", "eager"])
@pytest.mark.parametrize("kernels", ["auto", "cpu", "off"])
def test_inference_with_every_inner_compiler(inner: str, kernels: str) -> None:
    model = RoutedFFN().eval()
    compiled = torch.compile(model, backend="moefx", fullgraph=True, options={"inner": inner, "kernels": kernels})
    with torch.no_grad():
        x = torch.randn(2, 9, 24)
        torch.testing.assert_close(compiled(x), model(x))


def test_a_model_without_routing_compiles() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4))
    x = torch.randn(3, 4)
    torch.testing.assert_close(torch.compile(model, backend="moefx", options={"inner": "aot_eager"})(x), model(x))


def test_parameters_are_never_changed() -> None:
    model = RoutedFFN()
    before = {name: (id(p), p.detach().clone()) for name, p in model.named_parameters()}
    compiled = torch.compile(model, backend="moefx", options={"inner": "aot_eager"})
    compiled(torch.randn(2, 9, 24))
    for name, parameter in model.named_parameters():
        assert id(parameter) == before[name][0]
        assert torch.equal(parameter, before[name][1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernel": "auto"}, "did you mean 'kernels'"),
        ({"kernels": "tritn"}, "did you mean 'triton'"),
        ({"inner": "aot-eager"}, "did you mean 'aot_eager'"),
        ({"inner": None}, "known: aot_eager"),
        ({"kernels": ["auto"]}, "known: auto"),
    ],
)
def test_unknown_options_are_refused_with_the_nearest(options: dict[str, object], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        moefx.backend.BackendOptions.of(options)


def test_a_wrong_option_reaches_the_user() -> None:
    compiled = torch.compile(RoutedFFN(), backend="moefx", options={"kernel": "auto"})
    with pytest.raises(Exception, match="did you mean 'kernels'"):
        compiled(torch.randn(2, 9, 24))


def test_triton_on_cpu_without_the_interpreter_is_refused() -> None:
    compiled = torch.compile(RoutedFFN(), backend="moefx", options={"kernels": "triton"})
    with torch.no_grad(), pytest.raises(Exception, match=r"TRITON_INTERPRET=1|moefx\[gpu\]"):
        compiled(torch.randn(2, 9, 24))


def test_a_mode_without_inductor_is_refused() -> None:
    compiled = torch.compile(RoutedFFN(), backend="moefx", mode="max-autotune", options=None)
    assert compiled is not None
    with pytest.raises(OptionError, match="leave out mode"):
        moefx.backend.compile(
            torch.fx.GraphModule(nn.Module(), torch.fx.Graph()), [], mode="max-autotune", options={"inner": "eager"}
        )


def test_reset_is_attached_to_the_backend() -> None:
    assert moefx.backend.compile.reset is moefx.backend.reset  # type: ignore[attr-defined]
    moefx.backend.reset()


def test_backend_is_found_by_name_without_an_import_and_works_without_triton() -> None:
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, torch._dynamo as d; from tests.routed_toy import RoutedFFN\n"
        "assert 'moefx' in d.list_backends() and 'moefx.backend' not in sys.modules\n"
        "import importlib.util as u; find = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name == 'triton' else find(name, *a)\n"
        "m, x = RoutedFFN(), torch.randn(2, 9, 24)\n"
        "c = torch.compile(m, backend='moefx', options={'inner': 'aot_eager'})\n"
        "torch.testing.assert_close(c(x), m(x))\n"
        "assert 'moefx.backend' in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
