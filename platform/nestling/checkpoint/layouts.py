"""How Hugging Face lays out the decoders that attention here can be: Llama, Qwen2, Qwen3 and Mistral.

Their `config.json` to and from a model's configuration, and the names of their tensors. Logits have to stay what they
are, so what the model here cannot represent is refused by the name of its key; nothing is guessed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nestling.models.config import AttentionConfig, HopeAttentionConfig


class LayoutError(ValueError):
    """A pretrained model that cannot become one of ours, or one of ours that no family holds; the message is whole."""


@dataclass(frozen=True)
class Family:
    """What all models of one `model_type` have in common."""

    architecture: str
    qkv_bias: bool = False
    qk_norm: bool = False
    #: Width of a head where `head_dim` is left out; None: hidden_size / num_attention_heads.
    head_dim: int | None = None
    #: Window where `sliding_window` is left out.
    window: int | None = None
    #: Whether layers choose by `use_sliding_window`, `max_window_layers` and `layer_types` if the window is theirs.
    window_by_layer: bool = False


FAMILIES = {
    "llama": Family("LlamaForCausalLM"),
    "mistral": Family("MistralForCausalLM", window=4096),
    "qwen2": Family("Qwen2ForCausalLM", qkv_bias=True, window=4096, window_by_layer=True),
    "qwen3": Family("Qwen3ForCausalLM", qk_norm=True, head_dim=128, window=4096, window_by_layer=True),
}
#: Keys with the only values that keep the logits what they are here; a key that is left out has the first.
_ONLY: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "attention_dropout": (0, None),
    "quantization_config": (None,),
    "partial_rotary_factor": (None, 1),
    "is_encoder_decoder": (False, None),
}


def model_config(given: Mapping[str, Any]) -> HopeAttentionConfig:
    """The model that a `config.json` describes, as transformers reads it.

    Raises:
        LayoutError: another family, a key that is missing, or a value that cannot be represented.
    """
    kind = given.get("model_type")
    if kind not in FAMILIES:
        raise LayoutError(f"model_type: got {kind!r}, needs one of {', '.join(FAMILIES)}")
    family = FAMILIES[kind]
    for key, allowed in _ONLY.items():
        if given.get(key, allowed[0]) not in allowed:
            raise LayoutError(f"{key}: got {given[key]!r}, which Hope-Attention does not have; needs {allowed[0]!r}")
    base, scaling = _rotary(given)
    heads, width = _size(given, "num_attention_heads"), _size(given, "hidden_size")
    alone = kind == "llama" and given.get("num_key_value_heads") is None  # before keys were shared
    head_dim = given.get("head_dim") or family.head_dim
    if head_dim is None and width % heads:
        raise LayoutError(f"num_attention_heads: {heads} do not divide hidden_size={width}, and there is no head_dim")
    try:
        return HopeAttentionConfig(
            vocab_size=_size(given, "vocab_size"),
            width=width,
            layers=_size(given, "num_hidden_layers"),
            heads=heads,
            kv_heads=None if alone else _size(given, "num_key_value_heads"),
            head_dim=None if head_dim is None or head_dim * heads == width else head_dim,
            qkv_bias=family.qkv_bias,
            qk_norm=family.qk_norm,
            window=_window(given, family),
            rope_base=base,
            rope_scaling=scaling,
            norm_eps=float(given.get("rms_norm_eps", 1e-6)),
            mlp_width=_size(given, "intermediate_size"),
            tie_head=bool(given.get("tie_word_embeddings", False)),
            conv_width=0,
            level_widths=[],
        )
    except LayoutError:
        raise
    except (TypeError, ValueError) as error:
        raise LayoutError(f"a value that no model can have: {error}") from error


def _size(given: Mapping[str, Any], key: str) -> int:
    value = given.get(key)
    if type(value) is not int or value < 1:
        raise LayoutError(f"{key}: got {value!r}, needs a whole number of at least 1")
    return value


def _rotary(given: Mapping[str, Any]) -> tuple[float, list[float]]:
    """Base and scaling of the rotary frequencies, from `rope_parameters` or the older `rope_theta`, `rope_scaling`."""
    rope: Mapping[str, Any] = given.get("rope_scaling") or given.get("rope_parameters") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    base = rope.get("rope_theta", given.get("rope_theta", 10000.0))
    if any(isinstance(value, Mapping) for value in rope.values()):
        raise LayoutError(f"rope_parameters: got one set for each of {', '.join(rope)}, needs one for all layers")
    if rope.get("partial_rotary_factor") not in (None, 1):
        raise LayoutError(
            f"partial_rotary_factor: got {rope['partial_rotary_factor']}, needs 1: whole heads are rotated"
        )
    if kind == "default":
        return float(base), []
    if kind != "llama3":
        raise LayoutError(f"rope_type: got {kind!r}, needs 'default' or 'llama3'")
    length = given.get("original_max_position_embeddings") or rope.get("original_max_position_embeddings")
    values = [*(rope.get(key) for key in ("factor", "low_freq_factor", "high_freq_factor")), length]
    numbers = [float(value) for value in values if value is not None]
    if len(numbers) < len(values):
        raise LayoutError(
            f"rope_type llama3: got {dict(rope)}, needs factor, low_freq_factor, high_freq_factor and "
            "original_max_position_embeddings"
        )
    return float(base), numbers


def _window(given: Mapping[str, Any], family: Family) -> int | None:
    layers, window = _size(given, "num_hidden_layers"), None
    if family.window is not None and (not family.window_by_layer or given.get("use_sliding_window", False)):
        window = given.get("sliding_window", family.window)
    limited = 0 if window is None else layers
    if family.window_by_layer:
        limited = max(0, limited - given.get("max_window_layers", 28))
    kinds = given.get("layer_types") or ["sliding_attention"] * limited + ["full_attention"] * (layers - limited)
    if set(kinds) == {"sliding_attention"} and window is not None:
        return window
    if set(kinds) == {"full_attention"} and (family.window_by_layer or window is None):
        return None
    raise LayoutError(
        f"layer_types: got {', '.join(sorted(set(kinds)))} with sliding_window={window}, "
        "needs the same attention in all layers"
    )


def config_json(config: AttentionConfig, length: int, end: int) -> dict[str, Any]:
    """The `config.json` of a model that no pretrained one came before.

    Args:
        length: tokens of the sequences that it was trained on.
        end: the token that ends a text.

    Raises:
        LayoutError: no family has all that the model has.
    """
    if isinstance(config, HopeAttentionConfig) and config.mlp_width is None:
        raise LayoutError("it has a chain of levels in each block, for which transformers has no model")
    if isinstance(config, HopeAttentionConfig) and config.conv_width:
        raise LayoutError(
            f"it has convolutions before its attention (model.conv_width={config.conv_width}), "
            "for which transformers has no model"
        )
    if config.qkv_bias and config.qk_norm:
        raise LayoutError("it has model.qkv_bias and model.qk_norm, and no family has both")
    kind = "qwen2" if config.qkv_bias else "qwen3" if config.qk_norm else "llama"
    if kind == "llama" and (config.window is not None or config.width % config.heads):
        kind = "mistral"
    scaling = None
    if config.rope_scaling:
        factor, low, high, original = config.rope_scaling
        scaling = {"rope_type": "llama3", "factor": factor, "low_freq_factor": low, "high_freq_factor": high}
        scaling["original_max_position_embeddings"] = int(original)
    window: dict[str, Any] = {} if kind == "llama" else {"sliding_window": config.window}
    if FAMILIES[kind].window_by_layer:
        limited = config.window is not None
        window |= {"use_sliding_window": limited, "max_window_layers": 0 if limited else config.layers}
    return {
        "architectures": [FAMILIES[kind].architecture],
        "model_type": kind,
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "intermediate_size": config.mlp_hidden,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.key_heads,
        "head_dim": config.head_width,
        "hidden_act": "silu",
        "max_position_embeddings": length,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_base,
        "rope_scaling": scaling,
        "tie_word_embeddings": config.tie_head,
        "bos_token_id": end,
        "eos_token_id": end,
        **window,
    }


def tensor_names(config: AttentionConfig) -> dict[str, dict[str, int]]:
    """For each parameter here, the tensors there that it consists of, top to bottom, and the rows of each."""
    queries, keys = config.heads * config.head_width, config.key_heads * config.head_width
    rows = {"q_proj": queries, "k_proj": keys, "v_proj": keys}
    hidden, width, norm = config.mlp_hidden, config.width, config.head_width
    assert config.vocab_size is not None
    names = {"embedding.weight": {"model.embed_tokens.weight": config.vocab_size}}
    for layer in range(config.layers):
        here, there = f"blocks.{layer}", f"model.layers.{layer}"
        attention, mlp = f"{there}.self_attn", f"{there}.mlp"
        names[f"{here}.norm.weight"] = {f"{there}.input_layernorm.weight": width}
        names[f"{here}.mixer.qkv.weight"] = {f"{attention}.{part}.weight": n for part, n in rows.items()}
        if config.qkv_bias:
            names[f"{here}.mixer.qkv.bias"] = {f"{attention}.{part}.bias": n for part, n in rows.items()}
        if config.qk_norm:
            names[f"{here}.mixer.query_norm.weight"] = {f"{attention}.q_norm.weight": norm}
            names[f"{here}.mixer.key_norm.weight"] = {f"{attention}.k_norm.weight": norm}
        names[f"{here}.mixer.output.weight"] = {f"{attention}.o_proj.weight": width}
        names[f"{here}.feed_forward.0.norm.weight"] = {f"{there}.post_attention_layernorm.weight": width}
        names[f"{here}.feed_forward.0.into.weight"] = {
            f"{mlp}.gate_proj.weight": hidden,
            f"{mlp}.up_proj.weight": hidden,
        }
        names[f"{here}.feed_forward.0.out.weight"] = {f"{mlp}.down_proj.weight": width}
    names["norm.weight"] = {"model.norm.weight": width}
    if not config.tie_head:
        names["head.weight"] = {"lm_head.weight": config.vocab_size}
    return names
