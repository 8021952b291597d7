"""Routed building blocks: ordinary modules and functions that need no graph.

``router`` logits, ``select`` the experts, ``normalise`` their gates, ``experts`` stacked FFNs, ``moe`` the routed FFN,
``heads`` routed attention heads, ``channels`` routed neurons, ``threshold`` their switches, ``depths`` routed tokens of
a block, ``initialise`` starts from dense weights, ``losses`` and ``record`` balance terms and statistics, ``precision``
float32 where it matters.

``scorers`` and ``recurrent`` are what a router may be, ``selectors`` and ``by_expert`` who chooses whom, ``given`` what
only the caller knows, ``terms`` further auxiliary losses, ``cheap``, ``low_rank``, ``masks`` and ``mixture`` other
kinds of experts.
"""

from moefx.routing import initialise
from moefx.routing.activation import ACTIVATIONS, Gated, activation
from moefx.routing.by_expert import ExpertChoice
from moefx.routing.channels import ChannelGroups
from moefx.routing.cheap import CheapExperts
from moefx.routing.depths import TokenRouter, route_tokens
from moefx.routing.experts import DenseFFN, Experts
from moefx.routing.given import given
from moefx.routing.heads import HeadGate, QueryGate, apply_head_gates
from moefx.routing.low_rank import LowRankExperts
from moefx.routing.moe import RoutedFFN, Routing
from moefx.routing.normalise import MODES, default_mode, normalise
from moefx.routing.record import RoutingRecord
from moefx.routing.router import LinearRouter, sinusoidal
from moefx.routing.scorers import CosineScorer, LinearScorer, MLPScorer, Router, TableRouter
from moefx.routing.select import expand_groups, group_limited_top_k, top_k
from moefx.routing.selectors import (
    All,
    Forced,
    GumbelSigmoid,
    Interval,
    Multinomial,
    Race,
    Selector,
    Threshold,
    TopK,
    TopP,
)
from moefx.routing.threshold import ThresholdGate, budget_loss
from moefx.routing.tokens import follow, gather_rows, gather_tokens, put_tokens
from moefx.routing.weights import FFNWeights, random_weights

__all__ = [
    "ACTIVATIONS",
    "MODES",
    "All",
    "ChannelGroups",
    "CheapExperts",
    "CosineScorer",
    "DenseFFN",
    "ExpertChoice",
    "Experts",
    "FFNWeights",
    "Forced",
    "Gated",
    "GumbelSigmoid",
    "HeadGate",
    "Interval",
    "LinearRouter",
    "LinearScorer",
    "LowRankExperts",
    "MLPScorer",
    "Multinomial",
    "QueryGate",
    "Race",
    "RoutedFFN",
    "Router",
    "Routing",
    "RoutingRecord",
    "Selector",
    "TableRouter",
    "Threshold",
    "ThresholdGate",
    "TokenRouter",
    "TopK",
    "TopP",
    "activation",
    "apply_head_gates",
    "budget_loss",
    "default_mode",
    "expand_groups",
    "follow",
    "gather_rows",
    "gather_tokens",
    "given",
    "group_limited_top_k",
    "initialise",
    "normalise",
    "put_tokens",
    "random_weights",
    "route_tokens",
    "sinusoidal",
    "top_k",
]
