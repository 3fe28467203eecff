"""Parameters, cache bytes and floating-point operations as arithmetic on a configuration; no tensor is made."""

from __future__ import annotations

from workbench.model.cache_count import BYTES_PER_ELEMENT as BYTES_PER_ELEMENT
from workbench.model.cache_count import Precision as Precision
from workbench.model.cache_count import attention_cache_bytes as attention_cache_bytes
from workbench.model.cache_count import cache_bytes as cache_bytes
from workbench.model.cache_count import cache_elements_per_token as cache_elements_per_token
from workbench.model.flop_count import decode_flops_per_token as decode_flops_per_token
from workbench.model.flop_count import query_key_value_width as query_key_value_width
from workbench.model.flop_count import training_flops_per_token as training_flops_per_token
from workbench.model.parameter_count import ParameterCount as ParameterCount
from workbench.model.parameter_count import attention_parameters as attention_parameters
from workbench.model.parameter_count import feed_forward_parameters as feed_forward_parameters
from workbench.model.parameter_count import layer_parameters as layer_parameters
from workbench.model.parameter_count import parameters as parameters
