"""Diffusers: a transformed model gets a class of its own, so that whoever loads it without moefx is refused.

The class ``Moefx<Name>`` derives from the model's own one and claims the module ``moefx``; a pipeline writes it into
``model_index.json``, and ``DiffusionPipeline.from_pretrained`` finds it as ``moefx.Moefx<Name>``. The unknown name of a
quantiser in ``config.json`` stops loaders that are told a dense class: they would fill the missing weights at random.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import json
import os
import sys
from typing import Any

import torch
from torch import nn

from moefx.errors import InputError
from moefx.model.layout import JSON, Saved, unsafe

PREFIX = "Moefx"
_classes: dict[type, type[nn.Module]] = {}
_ON_HUB = ("cache_dir", "force_download", "proxies", "token", "revision", "local_files_only", "mirror", "user_agent")
_HINTS = ("low_cpu_mem_usage", "disable_mmap", "offload_state_dict", "output_loading_info", *_ON_HUB)


def is_diffusers(model: object) -> bool:
    """Tell whether ``model`` is a diffusers model that can be built from a config."""
    return isinstance(model, nn.Module) and _is_diffusers_class(type(model))


def _is_diffusers_class(cls: type) -> bool:
    diffusers: Any = sys.modules.get("diffusers")
    return diffusers is not None and issubclass(cls, diffusers.ModelMixin) and issubclass(cls, diffusers.ConfigMixin)


def as_saved_class(model: nn.Module) -> nn.Module:
    """Let a transformed diffusers model be an instance of its ``Moefx`` class; other models stay as they are."""
    cls = type(model)
    if is_diffusers(model) and not hasattr(cls, "_moefx_dense"):
        model.__class__ = _class_for(cls)
    return model


def lookup(name: str) -> Any:
    """Return the class ``moefx.Moefx<Name>``, or diffusers' ``ModelMixin``.

    Raises:
        AttributeError: no diffusers model of that name is known.
    """
    if name == "ModelMixin":
        return _optional("diffusers").ModelMixin
    return moefx_class(_find_dense(name.removeprefix(PREFIX)))


def moefx_class(dense: type[nn.Module]) -> type[nn.Module]:
    """Return the one ``Moefx`` class of a diffusers model class."""
    if dense not in _classes:
        _classes[dense] = _make(dense)
        _inherit_adapter_scaling(dense)
    return _classes[dense]


def _class_for(cls: type[nn.Module]) -> type[nn.Module]:
    """Return the class for instances of ``cls``, which may be a rewrite of a diffusers class under its name."""
    dense = next(
        (c for c in cls.__mro__ if c.__name__ == cls.__name__ and c.__module__ == cls.__module__ and _declared(c)), cls
    )
    made = moefx_class(dense)
    if dense is cls:
        return made
    if cls not in _classes:
        body = {"__module__": "moefx", "__qualname__": made.__name__, "__doc__": made.__doc__}
        _classes[cls] = type(made.__name__, (made, cls), body)
    return _classes[cls]


def _declared(cls: type) -> bool:
    """Tell a class that was written from one that a rewrite made under the same name: it constructs."""
    return "__init__" in cls.__dict__


def _make(dense: type[nn.Module]) -> type[nn.Module]:
    name = PREFIX + dense.__name__

    def __init__(self: nn.Module, *args: Any, **kwargs: Any) -> None:  # noqa: N807
        raise InputError(
            f"construct {name}",
            found="it is a transformed model, and a config alone does not say how",
            do=f"transform a {dense.__name__}, or load a folder with moefx.load or {name}.from_pretrained",
        )

    # Diffusers reads the names of the config from this signature.
    __init__.__signature__ = inspect.signature(dense.__init__)  # type: ignore[attr-defined]
    body = {
        "__init__": __init__,
        "__module__": "moefx",
        "__qualname__": name,
        "__doc__": f"A {dense.__name__} that moefx transformed.",
        "_moefx_dense": dense,
        "save_pretrained": _save_pretrained,
        "from_pretrained": _bound_to_class(_from_pretrained),
        "from_config": _bound_to_class(_from_config),
    }
    return type(name, (dense,), body)


def _bound_to_class(function: Any) -> Any:
    return classmethod(function)


def _save_pretrained(
    self: nn.Module,
    save_directory: str | os.PathLike[str],
    is_main_process: bool = True,
    save_function: Any = None,
    safe_serialization: bool = True,
    variant: str | None = None,
    max_shard_size: int | str = "10GB",
    push_to_hub: bool = False,
    use_flashpack: bool = False,
    **kwargs: Any,
) -> None:
    """Save the routed model, its config and its plan as one unit: :func:`moefx.save` under diffusers' name."""
    from moefx.model.save import save

    asked = f"save {type(self).__name__}"
    _refuse(asked, not safe_serialization, "safe_serialization=False", "moefx writes no pickles")
    _refuse(asked, save_function is not None, "save_function", "the folder is written as one unit")
    _refuse(asked, push_to_hub, "push_to_hub", "save, then upload the folder with huggingface_hub")
    _refuse(asked, use_flashpack, "use_flashpack", "moefx writes safetensors")
    _refuse(asked, bool(kwargs), ", ".join(kwargs), "moefx has no use for it")
    if not is_main_process:
        return
    save(self, save_directory, variant=variant, max_shard_size=max_shard_size)
    _tell_pipeline(self, sys._getframe(1))


def _tell_pipeline(model: nn.Module, frame: Any) -> None:
    """Let the pipeline that saves this model name its new class.

    A pipeline notes the class of a component when it is assigned; a model transformed in place has another one now, and
    the pipeline writes its notes after its components.
    """
    caller = frame.f_locals.get("self")
    if isinstance(caller, _optional("diffusers").DiffusionPipeline):
        for name, component in caller.components.items():
            if component is model or getattr(component, "_orig_mod", None) is model:
                caller.register_to_config(**{name: ("moefx", type(model).__name__)})


def _from_pretrained(
    cls: type[nn.Module],
    pretrained_model_name_or_path: str | os.PathLike[str],
    *,
    subfolder: str | None = None,
    torch_dtype: torch.dtype | None = None,
    dtype: torch.dtype | None = None,
    variant: str | None = None,
    use_safetensors: bool | None = None,
    device_map: Any = None,
    **kwargs: Any,
) -> nn.Module:
    """Load a folder that ``save_pretrained`` of this class wrote; in evaluation mode.

    The saved types of the weights are kept unless ``torch_dtype`` is given.
    """
    from moefx.model.layout import read_folder
    from moefx.model.load import load_class, local_folder

    asked = f"load {cls.__name__}"
    kwargs = {k: v for k, v in kwargs.items() if k not in _HINTS and v not in (None, False, {})}
    _refuse(asked, use_safetensors is False, "use_safetensors=False", "moefx reads no pickles")
    _refuse(asked, bool(kwargs), ", ".join(kwargs), "load the model first, then apply it")
    if not os.path.isdir(pretrained_model_name_or_path):
        raise InputError(
            asked,
            found=f"no folder {str(pretrained_model_name_or_path)!r}",
            do="download a repository first, for example with huggingface_hub.snapshot_download",
        )
    saved = read_folder(local_folder(pretrained_model_name_or_path, subfolder))
    dense: type[nn.Module] = cls._moefx_dense  # type: ignore[attr-defined]
    if saved.manifest.model != dense.__qualname__:
        raise unsafe(
            saved.folder, f"a save of {saved.manifest.model}, not of {dense.__qualname__}", do="load that class"
        )
    if saved.manifest.variant != variant:
        raise InputError(
            asked, found=f"variant {saved.manifest.variant!r}, not {variant!r}", do="pass the variant that was saved"
        )
    model = load_class(saved, dense, dtype if dtype is not None else torch_dtype)
    place = _single_device(asked, device_map)
    return model if place is None else model.to(place)


def _single_device(asked: str, device_map: Any) -> torch.device | None:
    if isinstance(device_map, dict) and list(device_map) == [""]:
        device_map = device_map[""]
    if device_map is None:
        return None
    try:
        return torch.device(device_map)
    except (RuntimeError, TypeError) as error:
        raise InputError(
            asked, found=f"device_map = {device_map!r}", do="load on one device, then use accelerate.dispatch_model"
        ) from error


def _from_config(cls: type[nn.Module], config: Any = None, **kwargs: Any) -> nn.Module:
    """Refuse: a config does not hold the plan."""
    return cls()


def _refuse(asked: str, when: bool, what: str, why: str) -> None:
    if when:
        raise InputError(asked, found=f"{what}", do=why)


def config_of(model: nn.Module) -> JSON:
    """Return what ``config.json`` says of a diffusers model, besides the ``moefx`` block."""
    owner: Any = model
    before = owner._internal_dict
    owner._internal_dict = type(before)(before)
    try:
        config: JSON = json.loads(owner.to_json_string())
    finally:
        owner._internal_dict = before  # to_json_string writes the class's name into it
    if "quantization_config" in config:
        raise InputError(
            f"save {type(model).__name__}", found="a quantised model", do="transform and save it before quantising"
        )
    return {**config, "quantization_config": {"quant_method": "moefx"}}


def build_dense(dense: type[nn.Module], config: JSON) -> nn.Module:
    """Build a diffusers model with its parameters on ``meta`` and everything else in memory."""
    accelerate = sys.modules.get("accelerate") or _optional("accelerate")
    without = accelerate.init_empty_weights(include_buffers=False) if accelerate else contextlib.nullcontext()
    with torch.random.fork_rng(devices=[]), without:
        model: nn.Module = dense.from_config(config)  # type: ignore[attr-defined]
    return model


def resolve_class(saved: Saved) -> type[nn.Module]:
    """Return the diffusers class of a saved folder; modules are never imported because a folder names them.

    Raises:
        InputError: it is no diffusers model, or its class is not known here.
    """
    name = saved.manifest.model
    asked = f"load {str(saved.folder)!r}"
    if str(saved.config.get("_class_name")) != PREFIX + name:
        raise InputError(
            asked,
            found=f"a save of {name}, which has no config to build it from",
            do="pass a fresh dense model: model=",
        )
    if _optional("diffusers") is None:
        raise InputError(asked, found=f"a save of {name}, a diffusers model", do="pip install moefx[diffusers]")
    try:
        return _find_dense(name)
    except AttributeError as error:
        raise InputError(asked, found=f"a save of {name}, an unknown class", do=str(error)) from error


def _find_dense(name: str) -> type[nn.Module]:
    """Return the diffusers model class of that name: of diffusers itself, or one that the user has imported."""
    diffusers = _optional("diffusers")
    found = getattr(diffusers, name, None) if diffusers else None
    if isinstance(found, type) and _is_diffusers_class(found):
        return found
    mixin = getattr(diffusers, "ModelMixin", None)
    known = [c for c in _subclasses(mixin) if c.__name__ == name and _is_diffusers_class(c) and _declared(c)]
    if len(known) == 1:
        return known[0]
    raise AttributeError(
        f"module 'moefx' has no attribute '{PREFIX}{name}': {len(known)} diffusers models named {name!r} are known; "
        "import the module that defines it first"
    )


def _subclasses(cls: type | None) -> list[type]:
    found: list[type] = cls.__subclasses__() if cls is not None else []
    return list(dict.fromkeys([*found, *(inner for c in found for inner in _subclasses(c))]))


@functools.cache
def _optional(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def _inherit_adapter_scaling(dense: type[nn.Module]) -> None:
    """Diffusers keys how it scales adapters by the name of the model's class."""
    peft = sys.modules.get("diffusers.loaders.peft")
    scaling = getattr(peft, "_SET_ADAPTER_SCALE_FN_MAPPING", None)
    if isinstance(scaling, dict) and dense.__name__ in scaling:
        scaling.setdefault(PREFIX + dense.__name__, scaling[dense.__name__])
