"""Reading a published `config.json` field by field: types checked, defaults stated, what is not modelled refused."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from workbench.model.config import Llama3Scaling, Rope, Yarn, require

_REFUSED: Any = object()


class Fields:
    """The fields of one published configuration; `owner` names it in error lines.

    Every reader takes the default of a field that is left out (none: the field is required). A field that is null is
    refused unless `null` says what that means. Of several names the first that is present counts.
    """

    def __init__(self, plain: Mapping[str, Any], owner: str) -> None:
        self.plain = plain
        self.owner = owner

    def integer(self, *names: str, default: int = _REFUSED, null: int = _REFUSED) -> int:
        """A whole number."""
        return self._read(names, (int,), "a whole number", default, null)

    def optional_integer(self, *names: str, default: int | None) -> int | None:
        """A whole number or null."""
        return self._read(names, (int,), "a whole number or null", default, None)

    def number(self, *names: str, default: float = _REFUSED) -> float:
        """A number."""
        return float(self._read(names, (int, float), "a number", default, _REFUSED))

    def optional_number(self, *names: str) -> float | None:
        """A number or null; null when left out."""
        value = self._read(names, (int, float), "a number or null", None, None)
        return None if value is None else float(value)

    def flag(self, *names: str, default: bool, null: bool = _REFUSED) -> bool:
        """True or false."""
        return self._read(names, (bool,), "true or false", default, null)

    def text(self, *names: str, default: str, null: str = _REFUSED) -> str:
        """A string."""
        return self._read(names, (str,), "a string", default, null)

    def mapping(self, name: str) -> Mapping[str, Any]:
        """A mapping; empty when null or left out."""
        return self._read((name,), (dict,), "a mapping or null", {}, {})

    def names(self, name: str, allowed: tuple[str, ...], length: int) -> list[str] | None:
        """A list with one of `allowed` for each of `length` layers; None when null or left out."""
        listed = self._read((name,), (list, tuple), "a list or null", None, None)
        if listed is None:
            return None
        unknown = [item for item in listed if item not in allowed]
        require(not unknown, f"{name} has {unknown[:1]}; {self.owner} may have {', '.join(allowed)}")
        require(len(listed) == length, f"{name} has {len(listed)} entries; num_hidden_layers={length}")
        return list(listed)

    def integers(self, name: str) -> list[int] | None:
        """A list of whole numbers; None when null or left out."""
        listed = self._read((name,), (list, tuple), "a list or null", None, None)
        if listed is not None:
            require(
                all(type(item) is int for item in listed), f"{name}={listed!r} must be whole numbers ({self.owner})"
            )
        return listed

    def only(self, name: str, *supported: Any) -> None:
        """Refuse a field that says something else than `supported`; left out or null, it says nothing."""
        value = self.plain.get(name)
        wanted = " or ".join(repr(item) for item in supported)
        require(
            value is None or value in supported,
            f"{name}={value!r} is not supported ({self.owner}): it must be {wanted}",
        )

    def _read(self, names: tuple[str, ...], kinds: tuple[type, ...], wanted: str, default: Any, null: Any) -> Any:
        name = next((name for name in names if name in self.plain), None)
        if name is None:
            require(default is not _REFUSED, f"{self.owner} lacks the field {names[0]!r}")
            return default
        value = self.plain[name]
        if value is None and null is not _REFUSED:
            return null
        require(type(value) in kinds, f"{name}={value!r} must be {wanted} ({self.owner})")
        return value


def rope_fields(fields: Fields, otherwise: Mapping[str, Any] | None = None) -> Fields:
    """What is said about positions, in the old style (`rope_scaling`) or the new (`rope_parameters`).

    `otherwise` is what the reference class assumes where a file says nothing.
    """
    said = fields.mapping("rope_scaling") or fields.mapping("rope_parameters") or otherwise or {}
    return Fields(said, f"the rope parameters of {fields.owner}")


def read_rope(
    fields: Fields,
    said: Fields,
    *,
    max_position_embeddings: int,
    rope_theta: float = 10_000.0,
    interleave: bool = False,
    sharpens_softmax: bool = False,
) -> Rope:
    """Positions as `said` describes them; `rope_theta` is the base where nobody names one.

    Only latent attention `sharpens_softmax` by `mscale_all_dim`. Elsewhere the two mscales scale cosines and sines and
    nothing more, which is written as an `attention_factor`.

    Raises:
        ValueError: a rope type other than default, yarn and llama3, or a missing or mistyped parameter.

    Source: the classes' shared handling of rope parameters, and `_compute_yarn_parameters`, in `transformers` 5.23.
    """
    theta = said.number("rope_theta", default=fields.number("rope_theta", default=rope_theta))
    kind = said.text("rope_type", "type", default="default")
    nested = [name for name, value in said.plain.items() if isinstance(value, Mapping)]
    require(not nested, f"{said.owner} differ by layer ({', '.join(nested)}), which is not supported")
    require(
        kind in ("default", "yarn", "llama3"),
        f"rope_type={kind!r} is not supported ({said.owner}): it must be 'default', 'yarn' or 'llama3'",
    )
    scaling: Yarn | Llama3Scaling | None = None
    if kind != "default":
        # A value beside the parameters wins over the one among them, as it does in the reference.
        original = fields.integer(
            "original_max_position_embeddings",
            default=said.integer("original_max_position_embeddings", default=max_position_embeddings),
        )
    if kind == "yarn":
        scaling = read_yarn(said, original, sharpens_softmax=sharpens_softmax)
    if kind == "llama3":
        scaling = Llama3Scaling(
            factor=said.number("factor"),
            low_freq_factor=said.number("low_freq_factor"),
            high_freq_factor=said.number("high_freq_factor"),
            original_max_position_embeddings=original,
        )
    return Rope(rope_theta=theta, rope_interleave=interleave, scaling=scaling)


def read_yarn(said: Fields, original_max_position_embeddings: int, *, sharpens_softmax: bool) -> Yarn:
    """YaRN's parameters; a value of 0 or null counts as left out, as in the reference."""
    factor = said.number("factor")
    mscale, mscale_all_dim = said.optional_number("mscale") or None, said.optional_number("mscale_all_dim") or None
    attention_factor = said.optional_number("attention_factor")
    plain = Yarn(
        factor=factor,
        original_max_position_embeddings=original_max_position_embeddings,
        beta_fast=said.optional_number("beta_fast") or 32.0,
        beta_slow=said.optional_number("beta_slow") or 1.0,
        mscale=mscale if sharpens_softmax else None,
        mscale_all_dim=mscale_all_dim if sharpens_softmax else None,
        attention_factor=attention_factor,
        truncate=said.flag("truncate", default=True),
    )
    if sharpens_softmax or attention_factor is not None or mscale is None or mscale_all_dim is None:
        return plain
    ratio = yarn_mscale(factor, mscale) / yarn_mscale(factor, mscale_all_dim)
    return replace(plain, attention_factor=ratio)


def yarn_mscale(factor: float, mscale: float) -> float:
    """YaRN's 0.1 mscale ln(factor) + 1, as in `workbench.blocks.rope`, which needs torch."""
    return 0.1 * mscale * math.log(factor) + 1.0


def no_partial_rotation(fields: Fields, said: Fields) -> None:
    """Refuse a share of the head that turns, where the reference turns the whole head whatever it is."""
    for place in (fields, said):
        place.only("partial_rotary_factor", 1)


def common(fields: Fields, *, rms_norm_eps: float = 1e-6) -> dict[str, Any]:
    """Fields that mean the same everywhere; another activation, or noise while training, is refused."""
    fields.only("hidden_act", "silu")
    fields.only("attention_dropout", 0)
    fields.only("router_jitter_noise", 0)
    return {
        "rms_norm_eps": fields.number("rms_norm_eps", default=rms_norm_eps),
        "tie_word_embeddings": fields.flag("tie_word_embeddings", default=False),
        "initializer_range": fields.number("initializer_range", default=0.02),
    }
