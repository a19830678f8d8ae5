"""The sidecar: the authors' files, ours, and every way in which a file can be wrong."""

from __future__ import annotations

import json
import pickle
import shutil

import pytest
import torch
from accelerate import init_empty_weights
from diffusers import UNet2DConditionModel, UNet3DConditionModel
from safetensors.torch import load_file, save_file

import linfusion
from linfusion.authors_api import published_for
from linfusion.layers.record import record_of
from linfusion.students.saving import learned, save
from linfusion.students.student import LinFusion, tensors_by_layer
from tests.student_files import GOLDEN, student_for
from tests.test_linearize import GOLDEN_UNETS, golden_unet, run_golden, same, snapshot
from tests.tiny import denoise, tiny_unet, tiny_xl_unet

AUTHORS = GOLDEN / "linfusion_unet_sd15_tiny" / "linfusion"
TENSORS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def folder(tmp_path):
    """A writable copy of a checkpoint of the authors."""
    shutil.copytree(AUTHORS, tmp_path / "student")
    return tmp_path / "student"


def rewrite(folder, change):
    tensors = load_file(folder / TENSORS)
    change(tensors)
    save_file(tensors, folder / TENSORS)


def reconfigure(folder, change):
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def test_the_authors_files_have_the_names_we_expect():
    assert set(LinFusion.from_pretrained(AUTHORS).state_dict()) == set(load_file(AUTHORS / TENSORS))


def test_every_tensor_of_the_authors_lands_where_it_belongs():
    unet, _ = golden_unet("linfusion_unet_sd15_tiny")
    linfusion.linearize(unet, weights=AUTHORS)
    attn = unet.mid_block.attentions[0].transformer_blocks[0].attn1
    theirs = load_file(AUTHORS / TENSORS)
    for name, ours in (
        ("3.to_q_.0.weight", attn.linfusion.map_q.first.weight),
        ("3.to_k_.1.bias", attn.linfusion.map_k.norm.bias),
        ("3.to_k_.3.weight", attn.linfusion.map_k.last.weight),
        ("3.to_v.weight", attn.to_v.weight),
        ("3.to_out.0.bias", attn.to_out[0].bias),
    ):
        assert torch.equal(theirs[name], ours), name


@pytest.mark.parametrize("mid", [None, 3, -1])
def test_every_hidden_width_survives_both_layouts(tmp_path, mid):
    unet = tiny_unet()
    side = student_for(unet, attention_weights=True, projection_mid_dim=mid)
    expected = denoise(linfusion.linearize(unet, weights=side))
    for layout in ("paths", "numbered"):
        save(unet, tmp_path / layout, layout=layout)
        again = linfusion.linearize(tiny_unet(), weights=tmp_path / layout)
        torch.testing.assert_close(denoise(again), expected, atol=1e-5, rtol=0)


def test_what_we_export_is_what_the_authors_save(tmp_path):
    unet, _ = golden_unet("linfusion_unet_sd15_tiny")
    linfusion.linearize(unet, weights=AUTHORS)
    save(unet, tmp_path, layout="numbered")
    theirs, ours = load_file(AUTHORS / TENSORS), load_file(tmp_path / TENSORS)
    assert theirs.keys() == ours.keys() and all(torch.equal(theirs[n], ours[n]) for n in ours)
    configs = [json.loads((f / "config.json").read_text()) for f in (AUTHORS, tmp_path)]
    assert configs[0]["modules_list"] == configs[1]["modules_list"]
    assert configs[0]["_class_name"] == configs[1]["_class_name"]


def test_our_names_are_those_of_the_linear_models_own_state_dict(tmp_path):
    unet = linfusion.linearize(tiny_unet(), weights=student_for(tiny_unet()))
    save(unet, tmp_path)
    ours = load_file(tmp_path / TENSORS)
    assert set(ours) == {name for name in unet.state_dict() if ".linfusion." in name}


def test_a_student_whose_projections_are_the_models_own_saves_the_map_alone(tmp_path):
    unet = linfusion.linearize(tiny_unet(), weights=student_for(tiny_unet()))
    save(unet, tmp_path)
    assert not any(".to_" in name for name in load_file(tmp_path / TENSORS))


def test_some_layers_are_saved_and_only_those_are_taken_again(tmp_path):
    unet = linfusion.linearize(tiny_unet(), layers="down_blocks")
    save(unet, tmp_path)
    again = linfusion.linearize(tiny_unet(), weights=tmp_path)
    assert list(record_of(again).layers) == list(record_of(unet).layers)


def test_the_older_list_form_is_read(folder):
    def older(config):
        config["_class_name"] = "StableMamba"
        config["modules_list"] = [
            [item["module_name"], item["dim_n"], item["heads"]] for item in config["modules_list"]
        ]

    unet, io = golden_unet("linfusion_unet_sd15_tiny")
    reconfigure(folder, older)
    linfusion.linearize(unet, weights=folder)
    torch.testing.assert_close(run_golden(unet, io), io["output_linfusion"], atol=2e-5, rtol=0)


def test_the_learned_part_is_what_the_model_computes_with():
    unet = linfusion.linearize(tiny_unet())
    before = denoise(unet)
    for parameter in learned(unet).parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    assert not torch.allclose(denoise(unet), before, atol=1e-4)


def test_the_learned_part_of_a_softmax_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match="UNet2DConditionModel is not linearized"):
        save(tiny_unet(), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def wrong_missing(folder):
    rewrite(folder, lambda t: [t.pop("0.to_q_.0.weight"), t.pop("1.to_v.weight")])


def wrong_extra(folder):
    rewrite(folder, lambda t: t.update({"0.gate.weight": torch.zeros(2)}))


def wrong_shape(folder):
    rewrite(folder, lambda t: t.update({"2.to_k_.1.bias": torch.zeros(5)}))


def wrong_truncated(folder):
    whole = (folder / TENSORS).read_bytes()
    (folder / TENSORS).write_bytes(whole[: len(whole) // 2])


def wrong_pickle(folder):
    (folder / TENSORS).write_bytes(pickle.dumps({"0.to_q.weight": [1.0]}))


def wrong_only_bin(folder):
    torch.save(load_file(folder / TENSORS), folder / "diffusion_pytorch_model.bin")
    (folder / TENSORS).unlink()


def wrong_no_config(folder):
    (folder / "config.json").unlink()


def wrong_item(folder):
    reconfigure(folder, lambda c: c["modules_list"].append({"layer": 3}))


def wrong_no_list(folder):
    reconfigure(folder, lambda c: c.pop("modules_list"))


def wrong_list(folder):
    reconfigure(folder, lambda c: c.update(modules_list=16))


def wrong_width(folder):
    reconfigure(folder, lambda c: c["modules_list"][0].update(dim_n="320"))


def wrong_json(folder):
    (folder / "config.json").write_text('{"modules_list": [')


def wrong_heads(folder):
    reconfigure(folder, lambda c: [item.update(heads=2) for item in c["modules_list"]])


@pytest.mark.parametrize(
    "spoil, message",
    [
        (wrong_missing, r"Missing: 0\.to_q_\.0\.weight, 1\.to_v\.weight\."),
        (wrong_extra, r"Unexpected: 0\.gate\.weight\."),
        (wrong_shape, r"Misshapen: 2\.to_k_\.1\.bias \(5,\), expected \(32,\)\."),
        (wrong_truncated, "weights: cannot read"),
        (wrong_pickle, "weights: cannot read"),
        (wrong_only_bin, "weights: cannot read"),
        (wrong_no_config, "weights: cannot read"),
        (wrong_json, "weights: cannot read"),
        (wrong_no_list, "modules_list: expected a list of layers in config.json, got None"),
        (wrong_list, "modules_list: expected a list of layers in config.json, got 16"),
        (wrong_width, r"modules_list: expected objects with .* got \{'dim_n': '320'"),
        (wrong_item, r"modules_list: expected objects with .* got \{'layer': 3\}"),
        (wrong_heads, r"for another model than this UNet2DConditionModel: .* has 2 heads, the mod"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_wrong_file_is_refused_and_nothing_changes(folder, spoil, message):
    unet, _ = golden_unet("linfusion_unet_sd15_tiny")
    before = snapshot(unet)
    spoil(folder)
    with pytest.raises(ValueError, match=message):
        linfusion.linearize(unet, weights=folder)
    assert same(before, snapshot(unet))


def test_pickle_is_never_opened(folder, monkeypatch):
    wrong_only_bin(folder)
    monkeypatch.setattr(torch, "load", lambda *a, **k: pytest.fail("opened a pickle"))
    with pytest.raises(ValueError, match="cannot read"):
        LinFusion.from_pretrained(folder)


@pytest.mark.parametrize("argument", ["use_safetensors", "safe_serialization"])
def test_asking_for_pickle_is_refused(tmp_path, argument):
    with pytest.raises(ValueError, match=f"{argument}: got False; only safetensors"):
        if argument == "use_safetensors":
            LinFusion.from_pretrained(AUTHORS, use_safetensors=False)
        else:
            LinFusion.from_pretrained(AUTHORS).save_pretrained(tmp_path, safe_serialization=False)


def test_a_checkpoint_with_other_layers_names_them():
    unet = tiny_xl_unet()
    before = snapshot(unet)
    with pytest.raises(ValueError) as error:
        linfusion.linearize(unet, weights=AUTHORS)
    text = str(error.value)
    assert "expected 11 layers for this UNet2DConditionModel, the checkpoint has 4" in text
    assert "Missing: down_blocks.1.attentions.0.transformer_blocks.0.attn1, " in text
    assert same(before, snapshot(unet))


def test_a_checkpoint_of_the_authors_for_fewer_layers_wants_them_named():
    unet = tiny_unet()
    with pytest.raises(ValueError, match=r"the checkpoint has 4\. Missing: down_blocks\.1\."):
        linfusion.linearize(unet, weights=AUTHORS)


def test_a_name_that_is_neither_folder_nor_repository_is_refused():
    with pytest.raises(ValueError, match="weights: cannot read Yuanshi/LinFusion-1-5"):
        linfusion.linearize(tiny_unet(), weights="Yuanshi/LinFusion-1-5")


def test_saving_replaces_whole_files_and_leaves_no_others(tmp_path):
    unet = linfusion.linearize(tiny_unet())
    for _ in range(2):
        save(unet, tmp_path)
    assert {f.name for f in tmp_path.iterdir()} == {"config.json", TENSORS}


def test_saving_that_fails_halfway_leaves_the_old_files(tmp_path, monkeypatch):
    unet = linfusion.linearize(tiny_unet())
    save(unet, tmp_path)
    before = (tmp_path / TENSORS).read_bytes()

    def disk_full(*args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr("diffusers.models.modeling_utils.safetensors.torch.save_file", disk_full)
    with pytest.raises(ValueError, match=r"save_directory: cannot write to .* No space left"):
        save(unet, tmp_path)
    assert (tmp_path / TENSORS).read_bytes() == before
    assert {f.name for f in tmp_path.iterdir()} == {"config.json", TENSORS}


def test_a_path_that_cannot_be_a_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    unet = linfusion.linearize(tiny_unet())
    before = snapshot(unet)
    with pytest.raises(ValueError, match="save_directory: cannot write to"):
        save(unet, tmp_path / "file" / "student")
    assert same(before, snapshot(unet))


def test_an_unknown_layout_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"layout: 'flat' is not one of \('numbered', 'paths'\)"):
        save(linfusion.linearize(tiny_unet()), tmp_path, layout="flat")


def test_variant_and_dtype_are_those_of_diffusers(tmp_path):
    unet = linfusion.linearize(tiny_unet().to(torch.bfloat16))
    save(unet, tmp_path, variant="bf16")
    side = LinFusion.from_pretrained(tmp_path, variant="bf16", dtype=torch.bfloat16)
    assert side.dtype == torch.bfloat16


def test_the_hub_gets_the_files_that_a_folder_gets(tmp_path, monkeypatch):
    sent = {}

    def upload(self, folder, repo_id, **kwargs):
        sent[repo_id] = {p.name for p in __import__("pathlib").Path(folder).iterdir()}

    monkeypatch.setattr(LinFusion, "_upload_folder", upload)
    hub = type("repo", (), {"repo_id": "me/student"})
    monkeypatch.setattr("diffusers.utils.hub_utils.create_repo", lambda *a, **k: hub)
    monkeypatch.setattr(
        "diffusers.utils.hub_utils.load_or_create_model_card",
        lambda *a, **k: type("card", (), {"save": lambda self, path: None, "data": None})(),
    )
    monkeypatch.setattr("diffusers.utils.hub_utils.populate_model_card", lambda card, **k: card)
    linfusion.students.saving.push(linfusion.linearize(tiny_unet()), "me/student")
    assert {"config.json", TENSORS} <= sent["me/student"]


SHAPES = {
    "Yuanshi/LinFusion-1-5": {
        "block_out_channels": (320, 640, 1280, 1280),
        "cross_attention_dim": 768,
        "attention_head_dim": 8,
    },
    "Yuanshi/LinFusion-2-1": {
        "block_out_channels": (320, 640, 1280, 1280),
        "cross_attention_dim": 1024,
        "attention_head_dim": (5, 10, 20, 20),
    },
    "Yuanshi/LinFusion-XL": {
        "block_out_channels": (320, 640, 1280),
        "cross_attention_dim": 2048,
        "attention_head_dim": (5, 10, 20),
        "transformer_layers_per_block": (1, 2, 10),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    },
}


@pytest.mark.parametrize("name", SHAPES)
def test_the_published_student_is_found_by_the_shape_of_the_model(name):
    with init_empty_weights():
        unet = UNet2DConditionModel(**SHAPES[name])
    assert published_for(unet) == name


def test_a_model_of_the_same_shape_that_is_another_gets_no_student():
    with init_empty_weights():
        kolors = UNet2DConditionModel(
            **SHAPES["Yuanshi/LinFusion-XL"],
            encoder_hid_dim=4096,
            encoder_hid_dim_type="text_proj",
        )
        video = UNet3DConditionModel(cross_attention_dim=1024)
    with pytest.raises(ValueError, match=r"a text of 4096 channels, as Kolors does"):
        published_for(kolors)
    with pytest.raises(ValueError, match="it is a UNet3DConditionModel"):
        published_for(video)


def test_a_shape_nobody_published_for_says_what_there_is():
    with pytest.raises(ValueError, match=r"\(7, \(4,\), 32\); there are Yuanshi/LinFusion-1-5: "):
        LinFusion.construct_for(unet=tiny_unet())


@pytest.mark.parametrize("name", GOLDEN_UNETS)
def test_the_call_of_the_authors_library_works(name):
    unet, io = golden_unet(name)
    side = LinFusion.construct_for(
        unet=unet, pretrained_model_name_or_path=GOLDEN / name / "linfusion"
    )
    torch.testing.assert_close(run_golden(unet, io), io["output_linfusion"], atol=2e-5, rtol=0)
    assert isinstance(side, LinFusion) and len(tensors_by_layer(side)) == 4


def test_the_call_of_the_authors_library_can_begin_a_training():
    unet = tiny_unet()
    side = LinFusion.construct_for(unet=unet, load_pretrained=False)
    ours = {id(p) for n, p in unet.named_parameters() if ".linfusion." in n}
    assert {id(p) for p in side.parameters()} == ours


@pytest.mark.parametrize("both", [True, False])
def test_the_call_of_the_authors_library_takes_one_model(both):
    unet = tiny_unet() if both else None
    with pytest.raises(ValueError, match="pipeline, unet: expected exactly one"):
        LinFusion.construct_for(pipeline=unet, unet=unet)
