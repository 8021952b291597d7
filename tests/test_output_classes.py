"""A model's own forward, rewritten: it returns its output class or the plain tuple, as the caller asks."""

from typing import Any

import pytest
import torch

from moefx import zoo
from moefx.errors import GuardError
from moefx.graph.inputs import synthesise
from moefx.model.forward import Forward, make_forward
from moefx.model.local import encode, local_graph, output_flag

NAMES = ["DiTTransformer2DModel", "SD3Transformer2DModel", "FluxTransformer2DModel", "WanTransformer3DModel"]


def rewritten(name: str) -> tuple[torch.nn.Module, dict[str, Any], Forward]:
    model = zoo.tiny(name)
    inputs = synthesise(model)
    described = {"args": [], "kwargs": {key: encode(value) for key, value in inputs.items()}}
    graph = local_graph(model, described, "children")
    return model, inputs, make_forward(graph, flag=output_flag(model, described, graph))


@pytest.mark.parametrize("name", NAMES)
def test_class_and_tuple(name: str) -> None:
    model, inputs, forward = rewritten(name)
    with torch.no_grad():
        for extra in ({}, {"return_dict": True}, {"return_dict": False}):
            found, wanted = forward(model, **inputs, **extra), model(**inputs, **extra)
            assert type(found) is type(wanted)
            assert len(found) == len(wanted) == 1
            assert torch.equal(found[0], wanted[0])


def test_without_a_flag_the_output_is_as_captured() -> None:
    model = zoo.tiny("DiTTransformer2DModel")
    inputs = synthesise(model)
    described = {"args": [], "kwargs": {key: encode(value) for key, value in inputs.items()}}
    forward = make_forward(local_graph(model, described, "children"))
    assert torch.equal(forward(model, **inputs).sample, model(**inputs).sample)
    with pytest.raises(GuardError, match="return_dict"):
        forward(model, **inputs, return_dict=False)


def test_compiles_whole() -> None:
    model, inputs, forward = rewritten("DiTTransformer2DModel")

    def call(**given: torch.Tensor) -> torch.Tensor:
        sample: torch.Tensor = forward(model, **given).sample
        return sample

    compiled = torch.compile(call, fullgraph=True, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(**inputs), model(**inputs).sample)
