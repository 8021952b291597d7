"""The reference models build, keep shapes, use all their inputs and pass gradients to every parameter."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from examples.dit import DiT, sincos_grid
from examples.functional_dit import FunctionalDiT
from examples.inline_dit import InlineDiT
from examples.randomise import randomise_zeros
from examples.vit import VisionTransformer

SMALL = {"image_size": 8, "patch": 2, "in_channels": 3, "depth": 2, "width": 32, "heads": 4, "classes": 5}
DENOISERS: list[Callable[..., nn.Module]] = [DiT, InlineDiT, FunctionalDiT]


def denoiser_inputs(batch: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, 3, 8, 8, generator=generator)
    return x, torch.rand(batch, generator=generator) * 1000, torch.arange(batch) % 5


@pytest.fixture(params=DENOISERS, ids=lambda make: make.__name__)
def denoiser(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = randomise_zeros(request.param(**SMALL))
    return model.eval()


def test_denoiser_output_has_the_shape_of_its_input_and_is_not_zero(denoiser: nn.Module) -> None:
    x, t, y = denoiser_inputs()
    out = denoiser(x, t, y)
    assert out.shape == x.shape
    assert out.isfinite().all()
    assert out.std() > 0.1


def test_every_trainable_parameter_gets_a_gradient(denoiser: nn.Module) -> None:
    denoiser(*denoiser_inputs()).square().mean().backward()
    dead = [
        name
        for name, parameter in denoiser.named_parameters()
        if parameter.requires_grad and (parameter.grad is None or not parameter.grad.any())
    ]
    # A key bias shifts all scores of a query alike, which softmax ignores.
    assert [name for name in dead if not name.endswith("k.bias")] == []


@pytest.mark.parametrize("position", [0, 1, 2], ids=["x", "t", "y"])
def test_denoiser_depends_on_each_input(denoiser: nn.Module, position: int) -> None:
    inputs = list(denoiser_inputs())
    before = denoiser(*inputs)
    inputs[position] = inputs[position].flip(0)
    assert not torch.allclose(before[0], denoiser(*inputs)[0], atol=1e-4)


def test_fresh_dit_predicts_zero() -> None:
    out = DiT(**SMALL)(*denoiser_inputs())
    assert not out.any()


def test_inline_and_modular_dit_are_the_same_function() -> None:
    torch.manual_seed(0)
    modular, inline = randomise_zeros(DiT(**SMALL)).eval(), InlineDiT(**SMALL).eval()
    state = {}
    for name, value in modular.state_dict().items():
        if ".attn.qkv." in name:
            for part, piece in zip("qkv", value.chunk(3), strict=True):
                state[name.replace("attn.qkv", part)] = piece
            continue
        for old, new in (("attn.proj", "out"), ("mlp.fc1", "up"), ("mlp.fc2", "down")):
            name = name.replace(old, new)
        state[name] = value
    inline.load_state_dict(state)
    torch.testing.assert_close(inline(*denoiser_inputs()), modular(*denoiser_inputs()))


def test_labels_are_dropped_in_training_only() -> None:
    model = randomise_zeros(DiT(**SMALL, label_dropout=0.5))
    x, t, y = denoiser_inputs()
    model.eval()
    torch.testing.assert_close(model(x, t, y), model(x, t, y), rtol=0, atol=0)
    labels = torch.zeros(1000, dtype=torch.long)
    null = model.y_embedder.embedding_table.weight[5]
    model.train()
    share = (model.y_embedder(labels) == null).all(dim=1).float().mean()
    assert 0.4 < share < 0.6


def test_sincos_positions_are_distinct() -> None:
    positions = sincos_grid(32, 4)[0]
    assert positions.shape == (16, 32)
    distances = torch.cdist(positions, positions) + torch.eye(16) * 9
    assert distances.min() > 0.5


def test_published_size_has_the_published_parameter_count() -> None:
    with torch.device("meta"):
        model = DiT.xl_2()
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    # 674.8 M in the paper's table, which counts the doubled output channels that predict variance.
    assert 674e6 < trainable < 675e6


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("layer_scale", [None, 0.1])
def test_vision_transformer(qk_norm: bool, layer_scale: float | None) -> None:
    torch.manual_seed(0)
    model = VisionTransformer(
        image_size=16, depth=2, width=32, classes=7, qk_norm=qk_norm, layer_scale=layer_scale, dropout=0.1
    )
    images = torch.randn(2, 3, 16, 16)
    logits = model(images)
    assert logits.shape == (2, 7)
    logits.square().mean().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    model.eval()
    torch.testing.assert_close(model(images), model(images), rtol=0, atol=0)


def test_impossible_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="do not divide"):
        DiT(image_size=9, patch=2)
    with pytest.raises(ValueError, match="do not divide"):
        FunctionalDiT(width=66, heads=4)
    with pytest.raises(ValueError, match="do not divide"):
        VisionTransformer(width=65)
