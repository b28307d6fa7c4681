"""Folders are complete or not there; reports and cards say what was done."""

import errno
import io
import json
import os
import stat

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from optimum_otprune import OTPruner, OTPruningConfig
from optimum_otprune.checkpoints import mixin
from optimum_otprune.checkpoints import save as checkpoint
from optimum_otprune.checkpoints.card import folder as folder_of_card
from optimum_otprune.checkpoints.card import plots
from optimum_otprune.checkpoints.card.folder import folder_card, replace_card
from optimum_otprune.checkpoints.card.render import model_card
from optimum_otprune.checkpoints.push import push_saved
from optimum_otprune.errors import IntegrityError, ModelLoadError, OutputError, ReportError
from optimum_otprune.functional.ratios import RescueEnergies
from optimum_otprune.pruning.report import REPORT_FILE, LayerReport, PruningReport
from optimum_otprune.storage import outputs
from optimum_otprune.storage.hub import push as sharing
from optimum_otprune.storage.manifest import MANIFEST_FILE, verify_folder, write_manifest
from tests.conftest import make_llama


@pytest.fixture
def pruner(llama, tokens):
    pruner = OTPruner.from_pretrained(llama, OTPruningConfig(pruning_ratio=0.5, multiple_of=1))
    pruner.prune(tokens, progress=False)
    return pruner


def make_report(ratio: float = 0.5, shift: float = 0.0) -> PruningReport:
    energies = RescueEnergies(output=10.0, pruned=4.0, error=4.0 * (1 - ratio), kept=8.0, shift=shift)
    layers = tuple(
        LayerReport(
            index, 8, 4, (0, 2, 3, 7), ratio, shift / 8, 0.5, 1.0, 0.4, 0.3, 0.2, float("inf"), False, energies
        )
        for index in range(2)
    )
    return PruningReport(
        OTPruningConfig().to_dict(),
        layers,
        1000,
        700,
        {"data": "texts", "num_samples": 1, "seqlen": 2, "num_tokens": 2},
    )


def test_a_full_disk_leaves_nothing_half_written_and_says_so(pruner, tmp_path, monkeypatch):
    for failure in (
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ):

        def fail(folder, failure=failure, **kwargs):
            (folder / "config.json").write_text("{}")
            raise failure

        monkeypatch.setattr(pruner.model, "save_pretrained", fail)
        with pytest.raises(OutputError, match="'out' could not be written: the disk is full. Nothing was left there"):
            pruner.save_pretrained(tmp_path / "out")
        assert list(tmp_path.iterdir()) == []


def test_an_overwrite_that_fails_leaves_the_old_folder(pruner, tmp_path, monkeypatch):
    pruner.save_pretrained(tmp_path / "out")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}

    def fail(folder, **kwargs):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(pruner.model, "save_pretrained", fail)
    with pytest.raises(OutputError, match="Input/output error"):
        pruner.save_pretrained(tmp_path / "out", overwrite=True)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def test_too_little_room_and_a_read_only_parent_are_refused_before_writing(pruner, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(outputs.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000})())
        with pytest.raises(OutputError, match="GB free, but the result needs"):
            pruner.save_pretrained(tmp_path / "out")
    monkeypatch.setattr(outputs.os, "access", lambda path, mode: False)
    with pytest.raises(OutputError, match="is not writable"):
        pruner.save_pretrained(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_is_a_file_is_refused(pruner, tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(OutputError, match="'out' is a file"):
        pruner.save_pretrained(tmp_path / "out")


def test_files_have_the_permissions_of_the_umask_which_other_threads_keep(pruner, tmp_path, monkeypatch):
    old = os.umask(0o027)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(os, "umask", None)
            folder = pruner.save_pretrained(tmp_path / "out")
    finally:
        os.umask(old)
    modes = {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()}
    assert modes == {0o640}
    assert stat.S_IMODE(folder.stat().st_mode) == 0o750


def test_shards_are_written_and_loaded(pruner, tokens, tmp_path):
    folder = pruner.save_pretrained(tmp_path / "out", max_shard_size="8KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=tokens).logits, pruner.model(input_ids=tokens).logits)


def test_sampling_parameters_without_sampling_are_no_obstacle(pruner, tmp_path):
    pruner.model.generation_config.temperature = 0.5
    folder = pruner.save_pretrained(tmp_path / "out")
    assert json.loads((folder / "generation_config.json").read_text())["temperature"] == 0.5


def test_tied_embeddings_stay_tied(tokens, tmp_path):
    pruner = OTPruner.from_pretrained(
        make_llama(tie_word_embeddings=True), OTPruningConfig(pruning_ratio=0.5, multiple_of=1)
    )
    pruner.prune(tokens, progress=False)
    restored = OTPruner.from_pretrained(pruner.save_pretrained(tmp_path / "out"))
    assert restored.model.lm_head.weight is restored.model.model.embed_tokens.weight


def test_a_checkpoint_that_lacks_a_tensor_is_refused_rather_than_filled_with_random_numbers(llama_folder):
    weights = load_file(llama_folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, llama_folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelLoadError, match=r"missing keys model.layers.1.mlp.up_proj.weight"):
        OTPruner.from_pretrained(llama_folder)


@pytest.mark.figure("R6")
@pytest.mark.parametrize("content", [b"", b"version https://git-lfs.github.com/spec/v1\n", b"\x00" * 64])
def test_damaged_weights_are_one_clear_error(llama_folder, content):
    (llama_folder / "model.safetensors").write_bytes(content)
    with pytest.raises(
        ModelLoadError,
        match="weights of the folder 'dense' are damaged|model.safetensors in 'dense' is a git-lfs pointer",
    ):
        OTPruner.from_pretrained(llama_folder)


def test_a_folder_without_a_config_and_a_file_are_refused(tmp_path):
    with pytest.raises(ModelLoadError, match="is empty, so it holds no model"):
        OTPruner.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_text("")
    with pytest.raises(ModelLoadError, match="'model.safetensors' is a file"):
        OTPruner.from_pretrained(tmp_path / "model.safetensors")


def test_no_file_holds_a_local_path(llama_folder, tokens, tmp_path):
    pruner = OTPruner.from_pretrained(llama_folder, OTPruningConfig(pruning_ratio=0.5, multiple_of=1))
    torch.save(tokens, tmp_path / "ids.pt")
    pruner.prune(tmp_path / "ids.pt", progress=False)
    pruner.evaluate(tmp_path / "ids.pt", progress=False)
    folder = pruner.save_pretrained(tmp_path / "out")
    for path in folder.iterdir():
        assert str(tmp_path).encode() not in path.read_bytes(), path.name


def test_a_report_survives_json_and_prints_the_summary(tmp_path, monkeypatch):
    report = make_report()
    monkeypatch.setenv("HOME", str(tmp_path))
    report.save("~/report.json")
    assert PruningReport.load("~/report.json") == PruningReport.load(tmp_path / "report.json") == report
    assert report.layers[0].ridge_lambda == float("inf")
    assert str(report.layers[0]) == (
        "Layer 00: Rescued 0.500 (50.0%) of pruned channels, Diluted 0.000 (0.0%) of kept channels"
    )
    sections = ("Model Overview", "Global Rescue Effect", "Global Dilution Effect", "Per-Layer Statistics")
    assert "RESCUE EFFECT SUMMARY REPORT" in str(report)
    assert all(section in str(report) for section in (*sections, "Interpretation"))


@pytest.mark.parametrize(
    ("ratio", "shift", "words"),
    [
        (0.51, 0.0, ("good", "low")),
        (0.3, 3.0, ("moderate", "moderate")),
        (0.1, 5.0, ("limited", "high")),
        (-0.5, 0.0, ("harmful", "low")),
    ],
)
def test_the_interpretation_follows_the_ratios(ratio, shift, words):
    lines = str(make_report(ratio, shift)).split("Interpretation")[1].splitlines()
    assert words[0] in lines[1]
    assert words[1] in lines[2]


@pytest.mark.figure("R6")
@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"layers": 3}', '{"layers": [{}]}'])
def test_a_file_that_is_no_report_is_one_clear_error(tmp_path, content):
    (tmp_path / "report.json").write_text(content)
    with pytest.raises(ReportError):
        PruningReport.load(tmp_path / "report.json")


def test_a_folder_has_a_card_made_of_its_configuration_and_report(pruner, tmp_path):
    folder = pruner.save_pretrained(tmp_path / "out")
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert card == folder_card(folder)
    assert 'from_pretrained("out")' in card
    assert ("rescue.png" in card) is (folder / "rescue.png").is_file() is plots.can_plot()


def test_a_card_made_again_leaves_the_folder_verified(pruner, tmp_path):
    folder = pruner.save_pretrained(tmp_path / "out")
    assert not replace_card(folder, folder_card(folder))
    assert not replace_card(folder, folder_card(folder, "user/name"))
    assert 'from_pretrained("user/name")' in (folder / "README.md").read_text(encoding="utf-8")
    verify_folder(folder)
    (folder / "README.md").write_text("edited by hand")
    assert replace_card(folder, folder_card(folder))
    verify_folder(folder)


@pytest.fixture
def sent_card(monkeypatch):
    """What a push of a folder to `user/name` sends as the card."""
    monkeypatch.setattr(sharing, "_start", lambda push: push.files["README.md"])
    return lambda folder: push_saved(folder, "user/name")


def test_a_card_for_a_repository_names_it_unless_it_was_edited(pruner, sent_card, tmp_path):
    folder = pruner.save_pretrained(tmp_path / "out")
    assert 'from_pretrained("user/name")' in sent_card(folder).decode()
    (folder / "README.md").write_text("mine")
    assert sent_card(folder) == b"mine"


@pytest.mark.parametrize("is_absent", [True, False])
def test_a_card_of_a_report_without_references_keeps_its_citations_in_a_push(pruner, sent_card, tmp_path, is_absent):
    folder = pruner.save_pretrained(tmp_path / "out")
    values = json.loads((folder / REPORT_FILE).read_text())
    values["references"] = None
    if is_absent:
        del values["references"]
    (folder / REPORT_FILE).write_text(json.dumps(values))
    write_manifest(folder)
    assert sent_card(folder) == (folder / "README.md").read_bytes()
    PruningReport.load(folder / REPORT_FILE).save(folder / REPORT_FILE)
    write_manifest(folder)
    assert sent_card(folder) == (folder / "README.md").read_bytes()


def test_a_push_reads_manifest_and_card_once(pruner, sent_card, monkeypatch, tmp_path):
    folder, opened = pruner.save_pretrained(tmp_path / "out"), []
    for module in (io, os):

        def noted(file, *args, real=module.open, **options):
            opened.append(os.path.basename(str(file)))
            return real(file, *args, **options)

        monkeypatch.setattr(module, "open", noted)
    sent_card(folder)
    assert (opened.count("README.md"), opened.count(MANIFEST_FILE), opened.count("config.json") > 0) == (1, 1, True)


def test_the_card_of_a_model_in_memory_is_rendered_once_and_names_the_repository(pruner, sent_card, monkeypatch):
    rendered = []

    def noted(*args, **options):
        rendered.append(model_card(*args, **options))
        return rendered[-1]

    monkeypatch.setattr(checkpoint, "model_card", noted)
    monkeypatch.setattr(folder_of_card, "model_card", noted)
    monkeypatch.setattr(mixin, "check_push", lambda name, options: name)
    assert 'from_pretrained("user/name")' in pruner.push_to_hub("user/name").decode()
    assert len(rendered) == 1


def test_a_folder_that_was_moved_or_whose_card_is_no_text_can_be_pushed(pruner, sent_card, tmp_path):
    folder = pruner.save_pretrained(tmp_path / "out").rename(tmp_path / "moved")
    assert 'from_pretrained("user/name")' in sent_card(folder).decode()
    (folder / "README.md").write_bytes(b"\xff\xfe")
    assert sent_card(folder) == b"\xff\xfe"


def test_an_output_that_is_a_link_is_refused_before_any_work(pruner, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with pytest.raises(OutputError, match="'link' is a link or a mounted folder"):
        pruner.save_pretrained(tmp_path / "link")


def test_without_matplotlib_there_is_no_plot_and_no_word_of_it(pruner, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "can_plot", lambda: False)
    folder = pruner.save_pretrained(tmp_path / "out")
    assert not (folder / "rescue.png").exists()
    assert "rescue.png" not in (folder / "README.md").read_text(encoding="utf-8")


def test_a_saved_folder_is_what_its_manifest_says_and_is_loaded_verified(pruner, tokens, tmp_path):
    folder = pruner.save_pretrained(tmp_path / "out", max_shard_size="8KB")
    assert set(verify_folder(folder)) == {path.name for path in folder.iterdir()} - {MANIFEST_FILE}
    assert OTPruner.from_pretrained(folder, verify=True).report == pruner.report


def test_a_flipped_byte_and_a_stale_file_are_told_by_a_verified_load_only(pruner, tmp_path):
    folder = pruner.save_pretrained(tmp_path / "out", max_shard_size="8KB")
    shard = sorted(folder.glob("model-*.safetensors"))[0]
    content = shard.read_bytes()
    shard.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    OTPruner.from_pretrained(folder)
    with pytest.raises(IntegrityError, match=f"changed: '{shard.name}'"):
        OTPruner.from_pretrained(folder, verify=True)
    shard.write_bytes(content)
    save_file(pruner.model.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(IntegrityError, match=r"extra: 'model.safetensors'"):
        OTPruner.from_pretrained(folder, verify=True)


def test_a_model_that_was_not_pruned_can_be_saved(llama, tmp_path):
    folder = OTPruner.from_pretrained(llama).save_pretrained(tmp_path / "out")
    assert "has not been pruned yet" in (folder / "README.md").read_text(encoding="utf-8")
    assert not (folder / "rescue.png").exists()
    assert OTPruner.from_pretrained(folder).report is None


CARD = "---\nlicense: llama3.2\nlanguage: [en]\n---\n# Dense\n"


def test_the_license_of_a_local_base_model_reaches_the_card_and_stays_when_pruned_again(
    llama_folder, tokens, tmp_path
):
    (llama_folder / "README.md").write_text(CARD)
    pruner = OTPruner.from_pretrained(llama_folder, OTPruningConfig(pruning_ratio=0.5, multiple_of=1))
    report = pruner.prune(tokens, progress=False)
    assert report.base_card == {"license": "llama3.2", "language": ["en"]}
    folder = pruner.save_pretrained(tmp_path / "out")
    assert "\nlicense: llama3.2\n" in (folder / "README.md").read_text(encoding="utf-8")
    again = OTPruner.from_pretrained(folder, OTPruningConfig(pruning_ratio=0.1, multiple_of=1))
    assert again.base_card == report.base_card


def test_the_license_of_a_base_model_in_the_cache_of_the_hub_is_found_offline(llama_folder, tmp_path):
    snapshot = tmp_path / "hub" / "models--user--dense" / "snapshots" / ("0" * 40)
    snapshot.parent.mkdir(parents=True)
    llama_folder.rename(snapshot)
    refs = snapshot.parents[1] / "refs"
    refs.mkdir()
    (refs / "main").write_text("0" * 40)
    without = OTPruner.from_pretrained("user/dense", cache_dir=tmp_path / "hub")
    assert (without.base_model, without.base_card) == ("user/dense", {})
    (snapshot / "README.md").write_text(CARD)
    assert OTPruner.from_pretrained("user/dense", cache_dir=tmp_path / "hub").base_card["license"] == "llama3.2"


def test_a_card_that_is_no_text_is_no_obstacle(llama_folder):
    (llama_folder / "README.md").write_bytes(b"---\nlicense: \xff\xfe\n---\n\x00")
    assert OTPruner.from_pretrained(llama_folder).base_card == {}
