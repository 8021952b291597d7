"""Example inputs for a diffusion denoiser, built from its own config and the signature of its ``forward``.

``synthesise(model)`` returns keyword arguments with which ``model(**kwargs)`` runs. Arguments are made by name
(`_arguments`), from the sizes in ``model.config`` (`_request`). A class whose arguments hang together in its own way
has a maker of its own (`_image`, `_packed`, `_video`, `_multimodal`, `_unet`, `_audio`, `_protein`), and so may a class
of yours: see `register_inputs`.
"""

from moefx.graph.inputs import _audio, _image, _multimodal, _packed, _protein, _unet, _video
from moefx.graph.inputs._registry import register_inputs, registered, synthesise
from moefx.graph.inputs._request import Request

__all__ = ["Request", "register_inputs", "registered", "synthesise"]

# Importing these modules registers their makers.
_MAKERS = (_audio, _image, _multimodal, _packed, _protein, _unet, _video)
