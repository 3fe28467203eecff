"""Operations of mixture-of-experts models, each with its definition, a fast CPU form and a Triton twin."""

from workbench_kernels.causal_attention import causal_attention as causal_attention
from workbench_kernels.describe import describe as describe
from workbench_kernels.gated import SWIGLU as SWIGLU
from workbench_kernels.gated import GatedActivation as GatedActivation
from workbench_kernels.grouped_mm import grouped_mm as grouped_mm
from workbench_kernels.mla_attention import mla_attention as mla_attention
from workbench_kernels.moe_mlp import moe_mlp as moe_mlp
from workbench_kernels.rms_norm import rms_norm as rms_norm
from workbench_kernels.rope import rope as rope
