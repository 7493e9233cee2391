"""Hugging Face's layout in and out: the logits are those of transformers for every family, and what cannot be
represented is refused by name. This is the one module that imports transformers, which takes seconds."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from nestling.checkpoint import load_final
from nestling.checkpoint.alone import WeightsHash
from nestling.checkpoint.layouts import LayoutError, model_config
from nestling.checkpoint.pretrained import export_pretrained, open_pretrained
from nestling.config import JobConfig, to_yaml
from nestling.data import Tokenizer
from nestling.models import HopeAttentionConfig, HopeConfig, TransformerConfig, build
from nestling.tracking import RunFolder

transformers = pytest.importorskip("transformers")

SMALL = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"rope_theta": 500.0, "original_max_position_embeddings": 32}
FAMILIES = {
    "llama": ("Llama", {}),
    "llama, as many heads of keys": ("Llama", {"num_key_value_heads": 4, "rms_norm_eps": 1e-3}),
    "llama, tied": ("Llama", {"tie_word_embeddings": True}),
    "llama 3": ("Llama", {"rope_parameters": LLAMA3, "head_dim": 16}),
    "qwen2": ("Qwen2", {}),
    "qwen2, window": ("Qwen2", {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 0}),
    "qwen2, no window up to the last layer": ("Qwen2", {"use_sliding_window": True, "max_window_layers": 3}),
    "qwen3": ("Qwen3", {"head_dim": 12, "tie_word_embeddings": True}),
    "mistral": ("Mistral", {"sliding_window": 9, "head_dim": 12}),
    "mistral, no window": ("Mistral", {"sliding_window": None}),
}


def theirs(family="Llama", **changes):
    """A model of transformers whose every weight, biases and norms too, is random."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**{**SMALL, **changes})
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def ours(folder):
    """The model that a folder holds, read as `nestling adapt` reads it."""
    found = open_pretrained(folder)
    model = build(found.config).eval().requires_grad_(False)
    parameters = dict(model.named_parameters())
    for name, weights in zip(found.shapes, found.read(), strict=True):
        parameters[name].copy_(weights)
    return model


def tokens(count=50):
    return torch.randint(0, 300, (2, count), generator=torch.Generator().manual_seed(1))


def finished(tmp_path, config):
    """A finished run of a model with random weights, made by hand."""
    run = RunFolder.create(tmp_path / "runs", "made")
    torch.manual_seed(3)
    save_file({name: p.detach() for name, p in build(config).named_parameters()}, run.weights)
    run.config.write_text(to_yaml(JobConfig(model=config)))
    Tokenizer.bytes().save(run.tokenizer)
    run.update(status="finished", steps=7)
    return run


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A small Llama's folder."""
    folder = tmp_path_factory.mktemp("pretrained") / "small"
    theirs().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("case", FAMILIES)
def test_the_logits_are_those_of_transformers(case, tmp_path):
    family, changes = FAMILIES[case]
    reference = theirs(family, **changes)
    reference.save_pretrained(tmp_path / "in")
    model, expected = ours(tmp_path / "in"), reference(tokens()).logits
    assert expected.std() > 0.5
    torch.testing.assert_close(model(tokens())[0], expected, rtol=0, atol=1e-4)
    state, streamed = None, []
    for piece in tokens().split((20, 1, 1, 28), dim=1):
        logits, state = model(piece, state)
        streamed.append(logits)
    torch.testing.assert_close(torch.cat(streamed, 1), expected, rtol=0, atol=1e-4)


def test_old_configurations_mean_the_same(llama):
    """Before version 5, rotary settings stood at the top level."""
    new = json.loads((llama / "config.json").read_text())
    old = {key: value for key, value in new.items() if key != "rope_parameters"}
    assert model_config(old | {"rope_theta": 10000.0, "rope_scaling": None}) == model_config(new)
    scaling = {key: value for key, value in LLAMA3.items() if key not in ("rope_theta", "rope_type")}
    stretched = model_config(new | {"rope_parameters": LLAMA3})
    assert model_config(old | {"rope_theta": 500.0, "rope_scaling": scaling | {"type": "llama3"}}) == stretched
    assert stretched.rope_scaling == [8, 1, 4, 32] and stretched.rope_base == 500


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_in_several_files_is_one_model(dtype, tmp_path):
    reference = theirs().to(dtype)
    reference.save_pretrained(tmp_path / "one")
    reference.save_pretrained(tmp_path / "many", max_shard_size="20KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 3
    widened = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "one", dtype=torch.float32)
    expected, hashes = widened(tokens()).logits.detach(), []
    for name in ("one", "many"):
        torch.testing.assert_close(ours(tmp_path / name)(tokens())[0], expected, rtol=0, atol=1e-4)
        found, digest = open_pretrained(tmp_path / name), WeightsHash()
        assert all(part.dtype == torch.float32 for part in digest.through(found.shapes, found.read()))
        hashes.append(digest.hexdigest())
    assert hashes[0] == hashes[1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mixtral"}, "model_type: got 'mixtral', needs one of llama, mistral, qwen2, qwen3"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "rope_type: got 'yarn', needs 'default' or"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type: got 'linear'"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "needs factor, low_freq_factor"),
        ({"rope_parameters": {"full_attention": {}}}, "needs one for all layers"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor: got 0.5"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config: got"),
        ({"attention_bias": True}, "attention_bias: got True"),
        ({"mlp_bias": True}, "mlp_bias: got True"),
        ({"hidden_act": "gelu"}, "hidden_act: got 'gelu'"),
        ({"num_hidden_layers": None}, "num_hidden_layers: got None, needs a whole number"),
        ({"num_attention_heads": 5}, "5 do not divide hidden_size=32"),
        ({"num_key_value_heads": 3}, "3 heads of keys do not divide"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "needs the same attention in all layers"),
        ({"intermediate_size": 64}, r"has the shape \[48, 32\], needs \[64, 32\] by config.json"),
        ({"num_hidden_layers": 4}, "model.layers.3.* and 6 more are missing"),
        ({"num_hidden_layers": 2}, "model.layers.2.* do not belong to it"),
        ({"tie_word_embeddings": True}, "set it to false to keep both"),
    ],
    ids=str,
)
def test_what_cannot_be_represented_is_named(llama, tmp_path, change, message):
    folder = shutil.copytree(llama, tmp_path / "changed")
    config = json.loads((folder / "config.json").read_text())
    if change.get("num_attention_heads"):
        del config["head_dim"]
    (folder / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(LayoutError, match=f"^{folder}: .*{message}"):
        open_pretrained(folder)


def test_a_window_in_some_layers_is_refused(tmp_path):
    theirs("Qwen2", use_sliding_window=True, sliding_window=9, max_window_layers=1).save_pretrained(tmp_path)
    with pytest.raises(LayoutError, match="got full_attention, sliding_attention with sliding_window=9"):
        open_pretrained(tmp_path)


def test_damaged_folders(llama, tmp_path):
    with pytest.raises(LayoutError, match="there is no config.json"):
        open_pretrained(tmp_path)
    folder = shutil.copytree(llama, tmp_path / "changed")
    weights = folder / "model.safetensors"
    tensors = load_file(weights)
    save_file(tensors | {"lm_head.weight": tensors["lm_head.weight"].to(torch.int8)}, weights)
    with pytest.raises(LayoutError, match="lm_head.weight: has the dtype I8, needs one of F64, F32, F16, BF16"):
        open_pretrained(folder)
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, weights)
    with pytest.raises(LayoutError, match="model.norm.weight holds values that are not finite"):
        list(open_pretrained(folder).read())
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(LayoutError, match=f"^{folder}: model.safetensors is no whole safetensors file: "):
        open_pretrained(folder)
    weights.unlink()
    with pytest.raises(LayoutError, match="model.safetensors is missing; weights must be in safetensors"):
        open_pretrained(folder)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"lm_head.weight": "../../secret"}}')
    with pytest.raises(LayoutError, match="no weight_map of files in this folder"):
        open_pretrained(folder)


def test_the_broken_file_is_named(llama, tmp_path):
    with pytest.raises(LayoutError, match=f"^{tmp_path}/none does not exist; give a folder"):
        open_pretrained(tmp_path / "none")
    folder = tmp_path / "many"
    theirs().save_pretrained(folder, max_shard_size="20KB")
    with pytest.raises(LayoutError, match=f"^{folder}/config.json is a file; give a folder"):
        open_pretrained(folder / "config.json")
    shard = sorted(folder.glob("*.safetensors"))[1]
    for content in (shard.read_bytes()[:-1], b"", b"no safetensors"):
        shard.write_bytes(content)
        with pytest.raises(LayoutError, match=f"^{folder}: {shard.name} is no whole safetensors file: "):
            open_pretrained(folder)
    for name in ("model.safetensors.index.json", "config.json"):
        for content in (b"{", b"\xff"):
            (folder / name).write_bytes(content)
            with pytest.raises(LayoutError, match=f"^{folder}: {name} is no JSON: "):
                open_pretrained(folder)


SIZES = {"vocab_size": 257, "width": 32, "layers": 2, "heads": 4}
MLP = {"mlp_width": 24, "conv_width": 0, "level_widths": []}


@pytest.mark.parametrize(
    ("config", "family"),
    [
        (TransformerConfig(**SIZES), "llama"),
        (TransformerConfig(**SIZES, tie_head=True, rope_scaling=[8, 1, 4, 32], kv_heads=1), "llama"),
        (TransformerConfig(**SIZES, window=9, head_dim=6), "mistral"),
        (HopeAttentionConfig(**SIZES, **MLP, qkv_bias=True, window=9), "qwen2"),
        (HopeAttentionConfig(**SIZES, **MLP, qk_norm=True, head_dim=6, norm_eps=1e-3), "qwen3"),
    ],
    ids=str,
)
def test_what_was_trained_here_goes_out(config, family, tmp_path):
    run, out = finished(tmp_path, config), tmp_path / "out"
    out.mkdir()
    assert export_pretrained(run, out) == 7
    reference, info = transformers.AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info.values()) and reference.config.model_type == family
    text = tokens() % 257
    with torch.no_grad():
        torch.testing.assert_close(reference(text).logits, load_final(run)[0](text)[0], rtol=0, atol=1e-4)
    assert model_config(json.loads((out / "config.json").read_text())).key_heads == config.key_heads
    library = transformers.PreTrainedTokenizerFast(tokenizer_file=str(out / "tokenizer.json"))
    assert library.decode(library("A text.")["input_ids"]) == "A text."


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (HopeConfig(**SIZES), "model.name=hope: transformers has no model with its parts"),
        (HopeAttentionConfig(**SIZES), "it has a chain of levels in each block"),
        (HopeAttentionConfig(**SIZES, mlp_width=24), "it has convolutions before its attention"),
        (TransformerConfig(**SIZES, qkv_bias=True, qk_norm=True), "no family has both"),
    ],
    ids=str,
)
def test_what_no_family_holds_stays_here(config, message, tmp_path):
    with pytest.raises(LayoutError, match=message):
        export_pretrained(finished(tmp_path, config), tmp_path)
