"""LoRAs: names, scales, exact merge, and the ones that do not belong here."""
import pytest
import torch
from forcing_pack.forcing_core.checkpoints import (
    ModelConfig,
    check_fit,
    convert,
    expected_shapes,
    load,
    load_lora,
    merge,
    parse_lora,
    to_comfy,
)
from forcing_pack.forcing_core.errors import ForcingError
from safetensors.torch import save_file

RANK = 4
CONFIG = ModelConfig(dim=128, num_heads=1, ffn_dim=192, num_layers=2, text_dim=32, freq_dim=16)
LAYERS = [f"blocks.{i}.{name}" for i in range(2) for name in
          (*(f"{a}_attn.{x}" for a in ("self", "cross") for x in "qkvo"), "ffn.0", "ffn.2")]


def tiny(seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator).to(dtype)
            for name, shape in expected_shapes(CONFIG).items()}


STATE = tiny()


def factors(name="base_model.model.{}.lora_{}.weight", seed=1, rank=RANK, sides="AB", state=STATE, layers=LAYERS):
    generator = torch.Generator().manual_seed(seed)
    out = {}
    for layer in layers:
        rows, columns = state[f"{layer}.weight"].shape
        out[name.format(layer, sides[0])] = torch.randn(rank, columns, generator=generator)
        out[name.format(layer, sides[1])] = torch.randn(rows, rank, generator=generator)
    return out


PEFT = factors()


def expected(layer, scale=1.0):
    down, up = (PEFT[f"base_model.model.{layer}.lora_{side}.weight"].double() for side in "AB")
    return STATE[f"{layer}.weight"].double() + scale * (up @ down)


def test_merging_adds_the_product_to_every_linear_layer_and_nothing_else():
    merged = merge(STATE, parse_lora(PEFT))
    for name, tensor in merged.items():
        layer = name.removesuffix(".weight")
        if layer in LAYERS:
            torch.testing.assert_close(tensor.double(), expected(layer), rtol=0, atol=1e-5)
            assert not torch.equal(tensor, STATE[name])
        else:
            assert torch.equal(tensor, STATE[name])
    assert list(merged) == list(STATE) and len(LAYERS) == 20
    assert torch.equal(STATE["blocks.0.ffn.0.weight"], tiny()["blocks.0.ffn.0.weight"]), "the input was changed"


@pytest.mark.parametrize("name", [
    "base_model.model.{}.lora_{}.weight",
    "base_model.model.{}.lora_{}.default.weight",
    "model.{}.lora_{}.generator.weight",
    "diffusion_model.{}.lora_{}.weight",
    "base_model.model.model._fsdp_wrapped_module.{}.lora_{}.weight",
    "{}.lora_{}",
])
def test_every_way_of_writing_the_names_is_the_same_lora(name):
    lora = parse_lora(factors(name))
    assert set(lora.pairs) == set(LAYERS) and lora.rank == RANK
    assert torch.equal(merge(STATE, lora)["blocks.1.ffn.2.weight"],
                       merge(STATE, parse_lora(PEFT))["blocks.1.ffn.2.weight"])


def test_down_and_up_are_the_comfyui_words_for_a_and_b():
    words = factors("diffusion_model.{}.lora_{}.weight", sides=("down", "up"))
    assert torch.equal(parse_lora(words).pairs["blocks.0.ffn.0"].down,
                       parse_lora(PEFT).pairs["blocks.0.ffn.0"].down)


@pytest.mark.parametrize(("alpha", "inside", "scale"), [
    (None, None, 1.0), (RANK, None, 1.0), (2 * RANK, None, 2.0), (None, 1.0, 1 / RANK), (8.0, 1.0, 1 / RANK),
])
def test_scale_is_alpha_over_rank_and_the_files_own_alpha_wins(alpha, inside, scale):
    tensors = dict(PEFT)
    if inside is not None:
        tensors |= {f"base_model.model.{layer}.alpha": torch.tensor(inside) for layer in LAYERS}
    lora = parse_lora(tensors, alpha=alpha)
    assert {pair.scale for pair in lora.pairs.values()} == {scale}
    torch.testing.assert_close(merge(STATE, lora)["blocks.0.self_attn.q.weight"].double(),
                               expected("blocks.0.self_attn.q", scale), rtol=0, atol=1e-5)


def test_strength_multiplies_and_zero_changes_nothing():
    lora = parse_lora(PEFT)
    half = merge(STATE, lora, strength=0.5)["blocks.0.self_attn.q.weight"].double()
    torch.testing.assert_close(half, expected("blocks.0.self_attn.q", 0.5), rtol=0, atol=1e-5)
    assert all(torch.equal(tensor, STATE[name]) for name, tensor in merge(STATE, lora, strength=0.0).items())


def test_half_precision_is_rounded_once():
    lora = parse_lora({name: tensor.bfloat16() for name, tensor in PEFT.items()})
    pair, weight = lora.pairs["blocks.0.ffn.0"], STATE["blocks.0.ffn.0.weight"].bfloat16()
    merged = merge({name: tensor.bfloat16() for name, tensor in STATE.items()}, lora)["blocks.0.ffn.0.weight"]
    assert merged.dtype is torch.bfloat16
    assert torch.equal(merged, (weight.float() + pair.up.float() @ pair.down.float()).bfloat16())
    assert not torch.equal(merged, weight + pair.up @ pair.down), "the test cannot tell one rounding from two"


def test_containers_of_longlive(tmp_path):
    path = tmp_path / "lora.pt"
    torch.save({"generator_lora": PEFT, "critic_lora": factors(seed=9)}, path)
    assert torch.equal(load_lora(path).pairs["blocks.0.ffn.0"].up, parse_lora(PEFT).pairs["blocks.0.ffn.0"].up)
    torch.save({"critic_lora": PEFT}, path)
    with pytest.raises(ForcingError, match="LoRA of a critic only"):
        load_lora(path)
    torch.save({"generator": STATE}, path)
    with pytest.raises(ForcingError, match="a model, not a LoRA"):
        load_lora(path)


def test_a_lora_given_as_checkpoint_is_named(tmp_path):
    torch.save({"generator_lora": PEFT}, tmp_path / "a.pt")
    save_file(PEFT, tmp_path / "b.safetensors")
    for name in ("a.pt", "b.safetensors"):
        with pytest.raises(ForcingError, match="holds a LoRA, not a model"):
            load(tmp_path / name)


def test_load_and_convert_merge_alike(tmp_path):
    torch.save({"generator": {f"model.{n}": t for n, t in STATE.items()}}, tmp_path / "longlive_base.pt")
    torch.save({"generator_lora": PEFT}, tmp_path / "lora.pt")
    loaded = load(tmp_path / "longlive_base.pt", lora=tmp_path / "lora.pt")
    assert type(loaded.state_dict) is dict and loaded.preset_name == "longlive"
    assert any("20 layers, rank 4, strength 1" in sentence for sentence in loaded.report)
    assert not any("also needs its LoRA" in sentence for sentence in loaded.report)
    convert(tmp_path / "longlive_base.pt", tmp_path / "out.safetensors", lora=tmp_path / "lora.pt", dtype="fp32")
    again = load(tmp_path / "out.safetensors")
    assert all(torch.equal(again.state_dict[name], tensor) for name, tensor in merge(STATE, parse_lora(PEFT)).items())
    assert again.preset_name == "longlive"
    assert not any("also needs its LoRA" in sentence for sentence in again.report), "it is merged already"
    convert(tmp_path / "out.safetensors", tmp_path / "twice.safetensors")
    assert load(tmp_path / "twice.safetensors").loras == ("lora.pt",), "converting again must not forget the LoRA"
    on_top = load(tmp_path / "out.safetensors", lora=tmp_path / "lora.pt")
    assert any("already had lora.pt merged in" in sentence for sentence in on_top.report)


def test_comfyui_names_come_back_as_the_same_lora():
    lora = parse_lora(PEFT, alpha=2.0 * RANK)
    names = to_comfy(lora)
    assert {name.rsplit(".lora_", 1)[0].removesuffix(".alpha") for name in names} == {
        f"diffusion_model.{layer}" for layer in LAYERS}
    assert "diffusion_model.blocks.0.self_attn.q.lora_A.weight" in names and len(names) == 60
    # ComfyUI computes alpha / rank itself, so the file must hold alpha, not the scale.
    assert float(names["diffusion_model.blocks.0.ffn.0.alpha"]) == 2.0 * RANK
    again = parse_lora(names)
    assert torch.equal(merge(STATE, again)["blocks.0.ffn.0.weight"], merge(STATE, lora)["blocks.0.ffn.0.weight"])


# --- LoRAs that do not belong to the model

def wide(width=5120):
    return {"diffusion_model.blocks.0.self_attn.q.lora_down.weight": torch.zeros(2, width),
            "diffusion_model.blocks.0.self_attn.q.lora_up.weight": torch.zeros(width, 2)}


def test_a_14b_speed_up_is_refused_with_what_to_use_instead():
    lora = parse_lora(wide(), name="Wan21_T2V_14B_lightx2v_cfg_step_distill_lora_rank32.safetensors")
    with pytest.raises(ForcingError, match="14B model.*bidirectional.*do not make a model autoregressive.*Use a check"):
        check_fit(lora, STATE)


def test_other_sizes_and_unknown_layers_are_refused():
    with pytest.raises(ForcingError, match="does not fit this model: 1 of its 1 layers"):
        check_fit(parse_lora(wide(256)), STATE)
    image = factors() | {"base_model.model.blocks.0.cross_attn.k_img.lora_A.weight": torch.zeros(RANK, 128),
                         "base_model.model.blocks.0.cross_attn.k_img.lora_B.weight": torch.zeros(128, RANK)}
    with pytest.raises(ForcingError, match="1 of its 21 layers.*k_img"):
        merge(STATE, parse_lora(image))


@pytest.mark.parametrize(("extra", "told"), [
    ({"diffusion_model.blocks.0.norm3.diff": torch.zeros(128)}, "not low-rank factors.*norm3.diff"),
    ({"diffusion_model.blocks.0.ffn.0.diff_b": torch.zeros(192)}, "not low-rank factors"),
    ({"base_model.model.blocks.0.ffn.0.dora_scale": torch.zeros(192)}, "not low-rank factors"),
    ({"blocks.0.ffn.0.lora_A.second.weight": torch.zeros(4, 128)}, "several adapters"),
])
def test_what_cannot_be_merged_exactly_is_refused(extra, told):
    with pytest.raises(ForcingError, match=told):
        parse_lora(PEFT | extra)


def test_broken_factors_are_refused():
    name = "base_model.model.blocks.0.ffn.0.lora_{}.weight"
    with pytest.raises(ForcingError, match="only one of the two factors for blocks.0.ffn.0"):
        parse_lora({k: v for k, v in PEFT.items() if k != name.format("B")})
    with pytest.raises(ForcingError, match="do not multiply"):
        parse_lora(PEFT | {name.format("B"): torch.zeros(192, RANK + 1)})
    with pytest.raises(ForcingError, match="holds no LoRA factors"):
        parse_lora({"weight": torch.zeros(1)})


def test_8_bit_weights_are_not_merged_into():
    state = STATE | {"blocks.0.ffn.0.weight": STATE["blocks.0.ffn.0.weight"].to(torch.float8_e4m3fn)}
    with pytest.raises(ForcingError, match="8-bit"):
        merge(state, parse_lora(PEFT))


def test_a_speed_up_of_the_right_size_is_reported(tmp_path):
    torch.save({"generator": STATE}, tmp_path / "self_forcing_dmd.pt")
    save_file(PEFT, tmp_path / "Wan21_CausVid_bidirect_1_3B_lora.safetensors")
    loaded = load(tmp_path / "self_forcing_dmd.pt", lora=tmp_path / "Wan21_CausVid_bidirect_1_3B_lora.safetensors")
    assert any("speed-up of a bidirectional model" in sentence for sentence in loaded.report)
