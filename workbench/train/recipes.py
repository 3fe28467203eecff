"""Runs as plain data: a recipe says all that a run depends on, and a few good ones are given."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Literal

from workbench.field_types import require_types
from workbench.model.codec import from_plain, to_plain
from workbench.model.config import (
    DenseFeedForward,
    LatentAttention,
    LayerConfig,
    MixtureOfExperts,
    ModelConfig,
    require,
    require_positive,
)
from workbench.text import BytePairs, Bytes, Mixture, StdlibCode, StdlibProse
from workbench.train.optimizer import AdamW
from workbench.train.schedule import WarmupCosine, WarmupStableDecay


@dataclass(frozen=True, kw_only=True)
class NoBalance:
    """Leave routing to itself."""


@dataclass(frozen=True, kw_only=True)
class AuxiliaryLoss:
    """Add `coefficient` times the balance loss of every expert layer, judged per batch or per sequence.

    With accumulation, a batch is what one pass reads, not the whole update.
    """

    coefficient: float = 0.01
    per: Literal["batch", "sequence"] = "batch"

    def __post_init__(self) -> None:
        require_types(self)
        require(self.coefficient > 0, f"coefficient={self.coefficient} must be above 0 (NoBalance leaves it out)")


@dataclass(frozen=True, kw_only=True)
class LossFreeBias:
    """Move the selection bias by `speed` after every update; optionally add a small loss per sequence, as V3 does.

    V3 used 0.001 over a million steps; a run of some hundred steps needs about 0.01 to balance in time.
    """

    speed: float = 0.01
    centred: bool = False
    sequence_coefficient: float = 0.0

    def __post_init__(self) -> None:
        require_types(self)
        require(0 <= self.speed < float("inf"), f"speed={self.speed} must be 0 or a positive finite number")
        require(self.sequence_coefficient >= 0, f"sequence_coefficient={self.sequence_coefficient} must be 0 or more")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One training run.

    An update takes `batch_size` x `accumulation_steps` sequences of `sequence_length` positions. With
    `dtype="bfloat16"` the passes compute in bfloat16 while weights and optimizer stay float32. `num_threads=None`
    leaves torch's thread count as it is; results are bitwise repeatable at an equal count only, so a live run replaces
    it by that number, records it, and resumes with it. `impl` chooses the form of every op of `workbench_kernels`: the
    fastest one that fits the device, the definition, or the Triton twin and nothing else. `indexer_weight` weighs what
    V3.2's lightning indexers learn from, next to the attention that they serve; without such a model, and at 0,
    nothing is added.
    """

    name: str
    model: ModelConfig
    text: Mixture
    tokenizer: Bytes | BytePairs = Bytes()  # noqa: RUF009 (frozen)
    sequence_length: int
    batch_size: int
    accumulation_steps: int = 1
    steps: int
    optimizer: AdamW
    schedule: WarmupCosine | WarmupStableDecay
    balance: NoBalance | AuxiliaryLoss | LossFreeBias = field(default_factory=LossFreeBias)
    mtp_weight: float = 0.3
    z_weight: float = 0.0
    indexer_weight: float = 1.0
    evaluate_every: int = 50
    evaluation_batches: int = 8
    checkpoint_every: int = 200
    sample_prompt: str = "def "
    sample_tokens: int = 120
    sample_temperature: float = 0.8
    sample_top_p: float = 0.95
    dtype: Literal["float32", "bfloat16"] = "float32"
    device: str = "cpu"
    impl: Literal["auto", "reference", "fused"] = "auto"
    num_threads: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        require(
            isinstance(self.text, Mixture),
            f"text={self.text!r} must be a Mixture; one corpus alone is Mixture({{corpus: 1}})",
        )
        require_types(self)
        require_positive(
            self,
            "sequence_length",
            "batch_size",
            "accumulation_steps",
            "steps",
            "evaluate_every",
            "evaluation_batches",
            "checkpoint_every",
        )
        require(
            self.sequence_length <= self.model.max_position_embeddings,
            f"sequence_length={self.sequence_length} must lie in 1..{self.model.max_position_embeddings}"
            " (max_position_embeddings)",
        )
        require(self.mtp_weight >= 0, f"mtp_weight={self.mtp_weight} must be 0 or more")
        require(self.z_weight >= 0, f"z_weight={self.z_weight} must be 0 or more")
        require(self.indexer_weight >= 0, f"indexer_weight={self.indexer_weight} must be 0 or more")
        require(self.sample_temperature >= 0, f"sample_temperature={self.sample_temperature} must be 0 or more")
        require(0 < self.sample_top_p <= 1, f"sample_top_p={self.sample_top_p} must lie in (0, 1]")
        require(self.sample_tokens >= 0, f"sample_tokens={self.sample_tokens} must be 0 or more")
        require(0 <= self.seed < 2**63, f"seed={self.seed} must be a whole number in 0..2**63-1")
        require(
            self.sample_tokens == 0 or self.sample_prompt != "",
            "sample_prompt='' must hold text (or sample_tokens be 0)",
        )
        require(
            self.num_threads is None or self.num_threads > 0,
            f"num_threads={self.num_threads} must be a whole number above 0, or None",
        )
        counts = {experts.n_routed_experts for _, experts in self.model.expert_layers()}
        require(
            len(counts) <= 1,
            f"expert layers of {sorted(counts)} experts: all must have one number, for a record of [layers, experts]",
        )
        for name, experts in self.model.expert_layers():
            require(
                not isinstance(self.balance, LossFreeBias) or experts.topk_method == "noaux_tc",
                f"LossFreeBias needs topk_method='noaux_tc'; {name} has {experts.topk_method!r}",
            )

    @property
    def lookahead(self) -> int:
        """Tokens beyond its positions that a sequence needs as targets."""
        return 1 + self.model.num_nextn_predict_layers

    @property
    def tokens_per_step(self) -> int:
        """Positions of one update."""
        return self.sequence_length * self.batch_size * self.accumulation_steps

    def to_json(self) -> str:
        """JSON text that `from_json` reads back to an equal recipe."""
        return json.dumps(to_plain(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> Recipe:
        """The recipe that `to_json` wrote.

        Raises:
            ValueError: not JSON, an unknown or missing field, or values that do not go together.
        """
        try:
            plain = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"not a recipe: {error}") from None
        return from_plain(cls, plain)


def v3_style(
    *,
    hidden_size: int,
    num_layers: int,
    num_attention_heads: int,
    q_lora_rank: int,
    kv_lora_rank: int,
    head_dim: int,
    n_routed_experts: int,
    num_experts_per_tok: int,
    moe_intermediate_size: int,
    vocab_size: int = 256,
    max_position_embeddings: int = 1024,
) -> ModelConfig:
    """A small model of DeepSeek-V3's shape: one leading dense layer, one shared expert, one further predicted token.

    `head_dim` is the content width of a query head and the value width; the rotary width is half of it.
    """
    attention = LatentAttention(
        num_attention_heads=num_attention_heads,
        q_lora_rank=q_lora_rank,
        kv_lora_rank=kv_lora_rank,
        qk_nope_head_dim=head_dim,
        qk_rope_head_dim=head_dim // 2,
        v_head_dim=head_dim,
    )
    experts = MixtureOfExperts(
        n_routed_experts=n_routed_experts,
        num_experts_per_tok=num_experts_per_tok,
        moe_intermediate_size=moe_intermediate_size,
        n_shared_experts=1,
        n_group=4,
        topk_group=2,
        routed_scaling_factor=2.5,
    )
    dense = DenseFeedForward(intermediate_size=(num_experts_per_tok + 1) * moe_intermediate_size)
    sparse = LayerConfig(attention, experts)
    return ModelConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        layers=(LayerConfig(attention, dense), *[sparse] * (num_layers - 1)),
        mtp_layers=(sparse,),
        max_position_embeddings=max_position_embeddings,
    )


def toy_v3() -> Recipe:
    """A V3-style model of about 10M parameters on the standard library: code, with one part prose in four.

    About 4 minutes on two quiet cores (226 s by `tests/benchmarks/toy_v3.py`), twice that on busy ones; validation 2.02
    nats per byte where counting pairs of bytes gives 2.60.
    """
    return Recipe(
        name="toy_v3",
        model=v3_style(
            hidden_size=256,
            num_layers=5,
            num_attention_heads=8,
            q_lora_rank=96,
            kv_lora_rank=64,
            head_dim=32,
            n_routed_experts=16,
            num_experts_per_tok=4,
            moe_intermediate_size=128,
        ),
        text=Mixture({StdlibCode(): 3.0, StdlibProse(): 1.0}),
        sequence_length=256,
        batch_size=8,
        steps=300,
        optimizer=AdamW(learning_rate=3e-3),
        schedule=WarmupCosine(warmup_steps=30),
    )


def small_v3() -> Recipe:
    """A V3-style model of about 50M parameters over byte pairs. Not run to its end yet: no time and loss are known."""
    vocab_size = 4096
    return Recipe(
        name="small_v3",
        model=v3_style(
            hidden_size=384,
            num_layers=8,
            num_attention_heads=8,
            q_lora_rank=192,
            kv_lora_rank=96,
            head_dim=48,
            n_routed_experts=32,
            num_experts_per_tok=4,
            moe_intermediate_size=160,
            vocab_size=vocab_size,
        ),
        text=Mixture({StdlibCode(): 3.0, StdlibProse(): 1.0}),
        tokenizer=BytePairs(vocab_size=vocab_size),
        sequence_length=512,
        batch_size=8,
        accumulation_steps=2,
        steps=2000,
        optimizer=AdamW(learning_rate=2e-3),
        schedule=WarmupStableDecay(warmup_steps=100, decay_steps=400),
    )
