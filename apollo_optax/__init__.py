"""APOLLO as Optax transformations, with a fraction of AdamW's optimizer memory."""

from apollo_optax._alias import apollo, apollo_mini, apollo_zero, racs
from apollo_optax._dimension_numbers import (
    ApolloDimensionNumbers,
    dimension_numbers_by_path,
    dimension_numbers_from,
)
from apollo_optax._flattening import ScaleByFlatteningState, scale_by_flattening
from apollo_optax._hyperparams import static_args
from apollo_optax._int8_trace import Int8TraceState, int8_trace
from apollo_optax._layerwise import LayerwiseMetrics, layerwise_apply, layerwise_step
from apollo_optax._limiter import LimitNormGrowthState, limit_norm_growth
from apollo_optax._quantization import (
    QuantizedArray,
    apply_updates_stochastic,
    dequantize,
    quantize,
)
from apollo_optax._racs import ScaleByRacsState, scale_by_racs
from apollo_optax._relative import scale_by_param_matrix_rms
from apollo_optax._state import ScaleByApolloState, state_owners, state_sharding
from apollo_optax._tabulate import StateBytes, state_bytes, tabulate
from apollo_optax._transform import scale_by_apollo

__version__ = "0.1.0"

__all__ = [
    "ApolloDimensionNumbers",
    "Int8TraceState",
    "LayerwiseMetrics",
    "LimitNormGrowthState",
    "QuantizedArray",
    "ScaleByApolloState",
    "ScaleByFlatteningState",
    "ScaleByRacsState",
    "StateBytes",
    "apollo",
    "apollo_mini",
    "apollo_zero",
    "apply_updates_stochastic",
    "dequantize",
    "dimension_numbers_by_path",
    "dimension_numbers_from",
    "int8_trace",
    "layerwise_apply",
    "layerwise_step",
    "limit_norm_growth",
    "quantize",
    "racs",
    "scale_by_apollo",
    "scale_by_flattening",
    "scale_by_param_matrix_rms",
    "scale_by_racs",
    "state_bytes",
    "state_owners",
    "state_sharding",
    "static_args",
    "tabulate",
]
