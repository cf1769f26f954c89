"""Weights files: every container form, what they are recognised as, errors, and conversion."""
import argparse
import errno
import json
import struct
import warnings

import pytest
import torch
from forcing_pack.forcing_core.checkpoints import (
    ModelConfig,
    convert,
    difference,
    expected_shapes,
    identify,
    infer,
    load,
    open_model,
    strip,
    strip_all,
    write_safetensors,
)
from forcing_pack.forcing_core.errors import ForcingError
from safetensors import safe_open
from safetensors.torch import load_file, save_file

CONFIG = ModelConfig(dim=128, num_heads=1, ffn_dim=192, num_layers=2, text_dim=32, freq_dim=16)


def tiny(seed=0, config=CONFIG, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator).to(dtype)
            for name, shape in expected_shapes(config).items()}


def under(prefix, state):
    return {prefix + name: tensor for name, tensor in state.items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


STATE, OTHER = tiny(0), tiny(1)


def put(path, content, **options):
    save_file(content, path, **options) if path.suffix == ".safetensors" else torch.save(content, path)
    return path


# --- names and shapes

def test_the_published_models_have_the_published_sizes():
    shapes = expected_shapes(ModelConfig(dim=1536, num_heads=12, ffn_dim=8960, num_layers=30))
    assert len(shapes) == 825
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) == 1_418_996_800
    large = expected_shapes(ModelConfig(dim=5120, num_heads=40, ffn_dim=13824, num_layers=40))
    assert round(sum(torch.Size(shape).numel() for shape in large.values()) / 1e9, 2) == 14.29


@pytest.mark.parametrize("wrapped", [
    "blocks.0.self_attn.q.weight",
    "model.blocks.0.self_attn.q.weight",
    "model._fsdp_wrapped_module.blocks.0.self_attn.q.weight",
    "model._fsdp_wrapped_module.blocks.0._fsdp_wrapped_module._checkpoint_wrapped_module.self_attn.q.weight",
    "_orig_mod.module.model.blocks.0._orig_mod.self_attn.q.weight",
    "diffusion_model.blocks.0.self_attn.q.weight",
    "model.diffusion_model.blocks.0.self_attn.q.weight",
])
def test_wrappers_are_stripped_wherever_they_stand(wrapped):
    assert strip(wrapped) == "blocks.0.self_attn.q.weight"


def test_two_copies_of_a_weight_are_an_error_not_a_lottery():
    with pytest.raises(ForcingError, match="1 weights occur twice"):
        strip_all({"model.head.modulation": 1, "module.head.modulation": 2})


def test_difference_names_what_is_wrong_in_one_sentence():
    state = dict(STATE)
    del state["head.modulation"]
    state["blocks.0.norm3.bias"] = torch.zeros(3)
    state |= {f"extra.{i}": torch.zeros(1) for i in range(5)}
    found = difference(state, CONFIG)
    assert found.missing == ("head.modulation",) and found.misshaped == ("blocks.0.norm3.bias",)
    assert found.sentence == ("Weights: 1 missing (head.modulation); 5 not expected (extra.0, extra.1, extra.2 and 2 "
                              "more); 1 of another shape (blocks.0.norm3.bias).")
    assert not difference(STATE, CONFIG)


# --- configuration

def test_config_comes_from_the_shapes():
    wide = ModelConfig(dim=256, num_heads=2, ffn_dim=320, num_layers=3, text_dim=64, freq_dim=32)
    assert infer(tiny(config=wide)) == wide
    assert infer(STATE, {"config": '{"transformer": {"causal_ar": true}}'}).causal_ar
    assert not infer(STATE, {"config": "not json"}).causal_ar
    assert not infer(STATE, {"config": "[1]"}).causal_ar


@pytest.mark.parametrize(("variant", "change"), [
    ("t2v", {}),
    ("i2v", {"img_emb.proj.0.bias": torch.zeros(1280)}),
    ("i2v", {"blocks.0.cross_attn.k_img.weight": torch.zeros(128, 128)}),
    ("vace", {"vace_blocks.0.norm3.bias": torch.zeros(128)}),
    ("wan2.2-5b", {"patch_embedding.weight": torch.zeros(128, 48, 1, 2, 2)}),
    ("other", {"patch_embedding.weight": torch.zeros(128, 36, 1, 2, 2)}),
])
def test_variants_are_recognised_and_only_plain_text_to_video_is_loaded(variant, change, tmp_path):
    path = put(tmp_path / "a.safetensors", STATE | change)
    assert identify(path).config.variant == variant
    if variant == "t2v":
        load(path)
    else:
        with pytest.raises(ForcingError, match="text-to-video"):
            load(path)


def test_a_width_that_is_no_multiple_of_128_needs_the_metadata_to_say_the_heads():
    config = ModelConfig(dim=192, num_heads=2, ffn_dim=192, num_layers=1, text_dim=32, freq_dim=16)
    with pytest.raises(ForcingError, match="192 does not divide"):
        infer(tiny(config=config))
    assert infer(tiny(config=config), {"config": '{"num_heads": 2}'}) == config


def test_quantised_weights_are_refused(tmp_path):
    path = put(tmp_path / "a.safetensors", STATE | {"blocks.0.ffn.0.scale_weight": torch.ones(1)})
    with pytest.raises(ForcingError, match="quantised"):
        load(path)


# --- containers

FSDP = "model._fsdp_wrapped_module."
FORMS = {
    "generator.pt": lambda s: {"generator": under("model.", s)},
    "generator.pth": lambda s: {"generator": under("model.", s)},
    "ema.pt": lambda s: {"generator_ema": under(FSDP, s), "step": 600},
    "model.pt": lambda s: {"model": s, "optimizer": {"lr": 1e-6}},
    "flat.pt": lambda s: under("model.", s),
    "flat.safetensors": lambda s: s,
    "comfy.safetensors": lambda s: under("model.diffusion_model.", s),
    "compiled.safetensors": lambda s: under("_orig_mod.", s),
}


@pytest.mark.parametrize("name", FORMS)
def test_every_container_form_gives_the_same_weights(name, tmp_path):
    loaded = load(put(tmp_path / name, FORMS[name](STATE)))
    assert same(loaded.state_dict, STATE) and loaded.config == CONFIG


def test_old_pickles_without_a_zip_are_read_too(tmp_path):
    path = tmp_path / "old.pt"
    torch.save({"generator": STATE}, path, _use_new_zipfile_serialization=False)
    assert same(load(path).state_dict, STATE)


def test_the_preset_decides_between_generator_and_ema_and_the_user_above_it(tmp_path):
    path = put(tmp_path / "a.pt", {"critic": OTHER, "generator": STATE, "generator_ema": OTHER})
    assert load(path, preset="self-forcing").key == "generator_ema"
    chunkwise = load(path, preset="causal-forcing-chunkwise")
    assert chunkwise.key == "generator" and same(chunkwise.state_dict, STATE)
    asked = load(path, preset="causal-forcing-chunkwise", key="generator_ema")
    assert same(asked.state_dict, OTHER)
    assert any("you asked for it" in sentence for sentence in asked.report)
    with pytest.raises(ForcingError, match="critic judges"):
        load(path, key="critic")
    with pytest.raises(ForcingError, match="no weights under 'model'. Choose one of critic, generator, generator_ema"):
        load(path, key="model")


def test_the_only_container_is_taken_and_the_report_says_so(tmp_path):
    loaded = load(put(tmp_path / "a.pt", {"generator": STATE}), preset="self-forcing")
    assert loaded.key == "generator"
    assert any("generator was taken because the file has no other" in sentence for sentence in loaded.report)


def test_the_file_name_chooses_the_container_of_its_authors(tmp_path):
    (tmp_path / "chunkwise").mkdir()
    path = put(tmp_path / "chunkwise" / "causal_forcing.pt", {"generator_ema": OTHER, "generator": STATE})
    loaded = load(path)
    assert (loaded.preset_name, loaded.key) == ("causal-forcing-chunkwise", "generator")


def test_a_name_of_two_files_asks_for_the_preset(tmp_path):
    path = put(tmp_path / "causal_forcing.pt", {"generator": STATE})
    loaded = load(path)
    assert loaded.preset_name is None
    assert any("causal-forcing-chunkwise, causal-forcing-framewise" in sentence for sentence in loaded.report)
    found = identify(path)
    assert found.candidates == ("causal-forcing-chunkwise", "causal-forcing-framewise") and not found.sure


def test_longlive_without_its_lora_is_reported(tmp_path):
    loaded = load(put(tmp_path / "longlive_base.pt", {"generator": STATE}))
    assert any("also needs its LoRA" in sentence for sentence in loaded.report)


# --- files that are no model

IMPOSTORS = {
    "empty": (b"", "is empty"),
    "html": (b"<!DOCTYPE html><html>Sign in</html>", "web page"),
    "html with space": (b"\n\n  <html lang=en>", "web page"),
    "json": (b'{"error": "Repository not found"}', "JSON"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "Git LFS"),
    "gguf": (b"GGUF\x03\x00\x00\x00\x00\x00", "GGUF"),
    "noise": (b"\x01\x02\x03" * 40, "neither"),
}


@pytest.mark.parametrize("kind", IMPOSTORS)
def test_other_files_are_named_for_what_they_are(kind, tmp_path):
    content, told = IMPOSTORS[kind]
    path = tmp_path / "a.pt"
    path.write_bytes(content)
    with pytest.raises(ForcingError, match=told):
        open_model(path)


def test_a_missing_file_and_a_folder(tmp_path):
    for path in (tmp_path / "nothing.pt", tmp_path):
        with pytest.raises(ForcingError, match="no file"):
            open_model(path)


@pytest.mark.parametrize("content", [
    {"critic": OTHER}, {"critic": OTHER, "critic_ema": OTHER},
])
def test_a_critic_is_refused(content, tmp_path):
    with pytest.raises(ForcingError, match="critic only"):
        load(put(tmp_path / "a.pt", content))


@pytest.mark.parametrize("content", [{"step": 3}, {}, {"generator": {}}, {"generator": {"lr": 1.0}}])
def test_a_file_without_tensors_is_refused(content, tmp_path):
    with pytest.raises(ForcingError, match="no tensors"):
        load(put(tmp_path / "a.pt", content))


def test_a_list_and_a_foreign_model_are_refused(tmp_path):
    with pytest.raises(ForcingError, match="holds a list"):
        load(put(tmp_path / "a.pt", [torch.zeros(1)]))
    with pytest.raises(ForcingError, match="not the weights of a Wan model"):
        load(put(tmp_path / "b.safetensors", {"down_blocks.0.weight": torch.zeros(2, 2)}))


def test_an_incomplete_model_is_refused(tmp_path):
    state = {name: tensor for name, tensor in STATE.items() if name != "blocks.1.ffn.2.bias"}
    with pytest.raises(ForcingError, match="1 missing .blocks.1.ffn.2.bias."):
        load(put(tmp_path / "a.pt", state))


def test_pickles_with_other_objects_are_refused_and_run_nothing(tmp_path):
    path = put(tmp_path / "a.pt", {"generator": STATE, "args": argparse.Namespace(lr=1)})
    with pytest.raises(ForcingError, match="could run code.*safetensors") as caught:
        load(path)
    assert "argparse.Namespace" in str(caught.value)


@pytest.mark.parametrize("kind", ["zip", "old", "safetensors"])
def test_truncated_files_are_refused_wherever_they_end(kind, tmp_path):
    whole = tmp_path / "whole"
    if kind == "safetensors":
        save_file(STATE, whole)
    else:
        torch.save({"generator": STATE}, whole, _use_new_zipfile_serialization=kind == "zip")
    content = whole.read_bytes()
    load(whole)
    part, size = tmp_path / "part.pt", len(content)
    ends = [1, 2, 3, 4, 7, 8, 9, 30, 64, 100, 512, 3000, *(size * i // 7 for i in range(1, 7)), size - 64, size - 1]
    for end in ends:
        part.write_bytes(content[:end])
        with pytest.raises(ForcingError):
            load(part)


@pytest.mark.parametrize("kind", ["zip", "old", "safetensors"])
def test_damaged_bytes_never_crash_with_something_else(kind, tmp_path):
    whole = tmp_path / "whole"
    small = {"generator": {"a": torch.zeros(4)}}
    if kind == "safetensors":
        save_file(small["generator"], whole)
    else:
        torch.save(small, whole, _use_new_zipfile_serialization=kind == "zip")
    content = whole.read_bytes()
    part = tmp_path / "part.pt"
    warnings.simplefilter("ignore")  # torch wonders about the changed protocol number
    for at in range(0, len(content), max(1, len(content) // 150)):
        part.write_bytes(content[:at] + bytes([content[at] ^ 0xFF]) + content[at + 1:])
        try:
            open_model(part)
        except ForcingError:
            pass  # refused: fine; so is a changed number, which no format can notice


def test_a_safetensors_header_that_lies_is_refused(tmp_path):
    header = json.dumps({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 400]}}).encode()
    path = tmp_path / "a.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(16))
    with pytest.raises(ForcingError, match="damaged"):
        open_model(path)


# --- conversion

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@pytest.mark.parametrize("dtype", DTYPES)
def test_conversion_keeps_every_weight_and_tells_its_origin(dtype, tmp_path):
    source = put(tmp_path / "self_forcing_dmd.pt", {"generator": under("model.", OTHER),
                                                    "generator_ema": under(FSDP, STATE)})
    target = tmp_path / "new" / "out.safetensors"
    seen = []
    convert(source, target, dtype=dtype, progress=lambda done, total: seen.append((done, total)))
    assert same(load_file(target), {name: tensor.to(DTYPES[dtype]) for name, tensor in STATE.items()})
    with safe_open(target, "pt") as file:
        assert file.metadata() == {"format": "pt", "forcing.source": "self_forcing_dmd.pt",
                                   "forcing.key": "generator_ema", "forcing.preset": "self-forcing"}
    assert len(seen) == len(STATE) and seen[-1][0] == seen[-1][1] == sum(t.nbytes for t in load_file(target).values())
    assert [p.name for p in target.parent.iterdir()] == ["out.safetensors"]


def test_a_converted_file_still_knows_its_preset_under_any_name(tmp_path):
    source = put(tmp_path / "a.pt", {"generator": STATE})
    convert(source, tmp_path / "self_forcing_dmd.safetensors", preset="causal-forcing++-2step")
    found = identify(tmp_path / "self_forcing_dmd.safetensors")
    assert found.candidates[0] == "causal-forcing++-2step" and found.sure
    assert load(tmp_path / "self_forcing_dmd.safetensors").preset_name == "causal-forcing++-2step"


def test_the_mark_for_the_hosts_own_sampler_is_only_set_on_request(tmp_path):
    source = put(tmp_path / "a.pt", {"generator": STATE})
    convert(source, tmp_path / "b.safetensors", causal_ar=True)
    assert identify(tmp_path / "b.safetensors").metadata["config"] == '{"transformer": {"causal_ar": true}}'
    assert identify(tmp_path / "b.safetensors").config.causal_ar


def test_existing_files_are_only_replaced_on_request(tmp_path):
    source, target = put(tmp_path / "a.pt", {"generator": STATE}), tmp_path / "b.safetensors"
    target.write_bytes(b"mine")
    with pytest.raises(ForcingError, match="exists already"):
        convert(source, target)
    assert target.read_bytes() == b"mine"
    convert(source, target, overwrite=True)
    assert load(target).config == CONFIG


@pytest.mark.parametrize(("target", "options", "told"), [
    ("a.ckpt", {}, "end with .safetensors"),
    ("a.safetensors", {"dtype": "fp8"}, "Choose one of bf16"),
    ("source.safetensors", {"overwrite": True}, "source itself"),
])
def test_unusable_targets_are_refused(target, options, told, tmp_path):
    source = put(tmp_path / "source.safetensors", STATE)
    with pytest.raises(ForcingError, match=told):
        convert(source, tmp_path / target, **options)
    assert same(load(source).state_dict, STATE)


@pytest.mark.parametrize(("number", "told"), [(errno.ENOSPC, "disk is full"), (errno.EIO, "could not be written")])
def test_a_failing_disk_leaves_nothing_behind(number, told, tmp_path, monkeypatch):
    source, target = put(tmp_path / "a.pt", {"generator": STATE}), tmp_path / "out" / "b.safetensors"

    def fsync(descriptor):
        raise OSError(number, "no")

    monkeypatch.setattr("os.fsync", fsync)
    with pytest.raises(ForcingError, match=told):
        convert(source, target)
    assert list(target.parent.iterdir()) == []


def test_an_interrupted_conversion_keeps_the_old_file(tmp_path):
    source, target = put(tmp_path / "a.pt", {"generator": STATE}), tmp_path / "b.safetensors"
    target.write_bytes(b"old")

    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(source, target, overwrite=True, progress=stop)
    assert target.read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 2


def test_values_that_fp16_cannot_hold_are_an_error(tmp_path):
    source = put(tmp_path / "a.pt", {"generator": STATE | {"head.head.bias": torch.full((64,), 1e6)}})
    with pytest.raises(ForcingError, match="too large for fp16"):
        convert(source, tmp_path / "b.safetensors", dtype="fp16")


def test_written_files_equal_those_of_the_official_writer(tmp_path):
    tensors = {"scalar": torch.tensor(2.0), "none": torch.zeros(0, 3), "whole": torch.arange(5),
               "strided": torch.randn(4, 6).t(), "half": torch.randn(3).half(), "flag": torch.tensor([True, False])}
    write_safetensors(tensors, tmp_path / "a.safetensors", metadata={"k": "v"})
    ours = load_file(tmp_path / "a.safetensors")
    assert same(ours, tensors) and all(ours[name].dtype == tensors[name].dtype for name in tensors)
    with pytest.raises(ForcingError, match="dtype"):
        write_safetensors({"a": torch.zeros(1, dtype=torch.complex64)}, tmp_path / "b.safetensors")
    assert not (tmp_path / "b.safetensors").exists()
