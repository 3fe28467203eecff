"""Operations of mixture-of-experts models, each with its definition, a fast CPU form and a Triton twin."""

from workbench_kernels.causal_attention import causal_attention as causal_attention
from workbench_kernels.describe import describe as describe
from workbench_kernels.gated import SWIGLU as SWIGLU
from workbench_kernels.gated import GatedActivation as GatedActivation
from workbench_kernels.grouped_mm import grouped_mm as grouped_mm
from workbench_kernels.linear_cross_entropy import linear_cross_entropy as linear_cross_entropy
from workbench_kernels.mla_attention import mla_attention as mla_attention
from workbench_kernels.mla_decode import Float8Cache as Float8Cache
from workbench_kernels.mla_decode import mla_decode as mla_decode
from workbench_kernels.moe_mlp import moe_mlp as moe_mlp
from workbench_kernels.moe_route import moe_route as moe_route
from workbench_kernels.quantize_blockwise import Quantized as Quantized
from workbench_kernels.quantize_blockwise import quantize_blockwise as quantize_blockwise
from workbench_kernels.rms_norm import rms_norm as rms_norm
from workbench_kernels.rope import rope as rope
from workbench_kernels.scaled_mm_blockwise import scaled_mm_blockwise as scaled_mm_blockwise
from workbench_kernels.sparse_select import sparse_select as sparse_select
