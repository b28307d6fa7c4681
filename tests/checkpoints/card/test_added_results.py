"""Results that are added to a saved folder: where they are shown, that they stay, and that nothing else is harmed."""

import json

import pytest
import yaml
from huggingface_hub import ModelCard, parse_eval_result_entries

from optimum_otprune import OTPruner, OTPruningConfig, PruningReport
from optimum_otprune.checkpoints.card.eval_results import EVAL_RESULTS_FILE
from optimum_otprune.checkpoints.card.folder import folder_card
from optimum_otprune.errors import ReportError
from optimum_otprune.storage.manifest import MANIFEST_FILE, read_manifest, verify_folder, write_manifest
from optimum_otprune.storage.outputs import own_files
from tests.conftest import run_command as run
from tests.reports import Page, lm_eval_content, make_report

FILES = ("README.md", EVAL_RESULTS_FILE, "otprune_report.json")


@pytest.fixture
def folder(tmp_path):
    """A saved folder whose weights are a few bytes."""
    path = tmp_path / "llama-half"
    path.mkdir()
    OTPruningConfig(pruning_ratio=0.5).save_pretrained(path)
    make_report().save(path / "otprune_report.json")
    (path / "config.json").write_text("{}")
    (path / "model.safetensors").write_bytes(b"weights")
    (path / "README.md").write_text(folder_card(path), encoding="utf-8")
    write_manifest(path)
    return path


@pytest.fixture
def results(tmp_path):
    """Writes a results file and returns its path."""

    def write(name="results.json", **changes):
        (tmp_path / name).write_text(json.dumps(lm_eval_content(**changes)))
        return tmp_path / name

    return write


def test_report_card_manifest_and_what_the_hub_reads_have_the_results(folder, results, capsys):
    dense = results("dense.json", num_parameters=1000, value=0.5)
    assert run("card", folder, "--lm-eval", results(), dense) == 0
    assert capsys.readouterr() == (
        f"Added 6 results of lm-eval to llama-half: otprune_report.json, {EVAL_RESULTS_FILE}, README.md.\n",
        "",
    )
    assert set(FILES) <= set(verify_folder(folder))
    page = Page((folder / "README.md").read_text(encoding="utf-8"))
    assert "exact_match (strict-match) ↑50.5 ± 0.0120.25 ± 0.0121,319" in page.text.replace("\n", "")
    assert "Measured by lm-eval 0.4.13 (float32, 2026-11-30)." in page.text
    assert "accuracy on other tasks" in page.text
    (entry,) = parse_eval_result_entries(yaml.safe_load((folder / EVAL_RESULTS_FILE).read_text(encoding="utf-8")))
    assert (entry.dataset_id, entry.task_id, entry.value, entry.date) == ("openai/gsm8k", "gsm8k", 25.0, "2026-11-30")
    assert entry.notes == "lm-eval 0.4.13, 5-shot, exact_match (strict-match)"
    metrics = ModelCard.load(folder / "README.md").data.eval_results
    found = {(result.dataset_name, result.metric_name): result.metric_value for result in metrics}
    assert found["gsm8k", "exact_match (strict-match) (pruned, lm-eval 0.4.13)"] == 0.25
    assert found["gsm8k", "exact_match (strict-match) (base model, lm-eval 0.4.13)"] == 0.5
    assert found["arc_easy", "acc (pruned, lm-eval 0.4.13)"] == 0.25
    assert run("report", folder) == 0
    assert "arc_easy of the dense model: acc 0.5000 ± 0.0120 (lm-eval 0.4.13)\n" in capsys.readouterr().out


def test_they_stay_when_the_card_is_made_again_and_later_ones_take_their_place(folder, results):
    assert run("card", folder, "--lm-eval", results()) == 0
    first = {name: (folder / name).read_bytes() for name in (*FILES, MANIFEST_FILE)}
    assert run("card", folder, "--write") == 0
    assert run("card", folder, "--lm-eval", results()) == 0
    assert first == {name: (folder / name).read_bytes() for name in (*FILES, MANIFEST_FILE)}
    assert run("card", folder, "--lm-eval", results(value=0.75)) == 0
    assert [task.value for task in PruningReport.load(folder / "otprune_report.json").tasks] == [0.75] * 3
    assert "value: 75.0" in (folder / EVAL_RESULTS_FILE).read_text()
    verify_folder(folder)


def test_a_part_of_a_benchmark_is_shown_as_such_and_not_given_to_leaderboards(folder, results):
    assert run("card", folder, "--lm-eval", results()) == 0
    assert run("card", folder, "--lm-eval", results(limit=10)) == 0
    assert not (folder / EVAL_RESULTS_FILE).exists()
    assert EVAL_RESULTS_FILE not in read_manifest(folder)
    assert "| 1,319, not all |" in (folder / "README.md").read_text(encoding="utf-8")
    verify_folder(folder)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_process_killed_on_the_way_is_repaired_by_the_same_command(folder, results, count, monkeypatch):
    from optimum_otprune.checkpoints.card import folder as module

    saved, save_text = [], module.save_text

    def killed(file, *others, **options):
        if len(saved) == count:
            raise KeyboardInterrupt
        saved.append(file)
        save_text(file, *others, **options)

    monkeypatch.setattr(module, "save_text", killed)
    assert run("card", folder, "--lm-eval", results()) == 130
    monkeypatch.undo()
    assert run("card", folder, "--lm-eval", results()) == 0
    assert EVAL_RESULTS_FILE in verify_folder(folder)


def test_a_card_that_was_edited_by_hand_is_replaced_only_if_asked(folder, results, capsys):
    text = (folder / "README.md").read_text(encoding="utf-8") + "my words"
    (folder / "README.md").write_text(text, encoding="utf-8")
    report = (folder / "otprune_report.json").read_bytes()
    assert run("card", folder, "--lm-eval", results()) == 1
    assert "perhaps edited by hand. Set `--write` to replace it" in capsys.readouterr().err
    assert (folder / "README.md").read_text(encoding="utf-8") == text
    assert (folder / "otprune_report.json").read_bytes() == report
    assert run("card", folder, "--lm-eval", results(), "--write") == 0
    assert "my words" not in (folder / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["otprune_report.json", EVAL_RESULTS_FILE])
def test_a_file_that_is_not_as_it_was_saved_stays(folder, results, name, capsys):
    report = make_report(parameters_before=2000)
    (folder / ".eval_results").mkdir()
    (folder / name).write_text(report.to_json_string())
    assert run("card", folder, "--lm-eval", results()) == 1
    assert f"(changed: '{name}')" in capsys.readouterr().err
    assert (folder / name).read_text() == report.to_json_string()


def test_results_of_the_dense_model_alone_or_of_a_folder_without_a_report_are_refused(folder, results, capsys):
    assert run("card", folder, "--lm-eval", results(num_parameters=1000)) == 1
    assert "of the dense model alone" in capsys.readouterr().err
    (folder / "otprune_report.json").unlink()
    assert run("card", folder, "--lm-eval", results()) == 1
    assert "has no otprune_report.json" in capsys.readouterr().err


def test_another_name_is_told_and_taken(folder, results, capsys):
    assert run("card", folder, "--lm-eval", results(model="/home/me/other")) == 0
    assert capsys.readouterr().err == ("warning: The results call the model 'other'; its size is that of this one.\n")


def test_names_of_strangers_become_no_structure_of_a_card(folder, results):
    assert run("card", folder, "--lm-eval", results(task="<img src=x>|[a](b)\n# c")) == 0
    page = Page((folder / "README.md").read_text(encoding="utf-8"))
    assert "<img src=x>|[a](b) # c" in page.text
    assert not {"img", "h1"} & set(page.elements[1:])


def test_all_files_of_such_a_folder_are_ours_but_not_those_of_others_in_it(folder, results):
    assert run("card", folder, "--lm-eval", results()) == 0
    assert own_files(folder)[1] is None
    (folder / ".eval_results" / "mine.yaml").write_text("- value: 1")
    assert own_files(folder)[1] == ".eval_results/mine.yaml"


def test_a_model_that_is_loaded_and_saved_again_keeps_them(llama, tokens, tmp_path, results):
    pruner = OTPruner(llama, OTPruningConfig(method="flap", pruning_ratio=0.5, multiple_of=1))
    pruner.prune(tokens, progress=False)
    first = pruner.save_pretrained(tmp_path / "first")
    parameters = llama.num_parameters()
    assert run("card", first, "--lm-eval", results(num_parameters=parameters)) == 0
    second = OTPruner.from_pretrained(first, verify=True).save_pretrained(tmp_path / "second")
    assert EVAL_RESULTS_FILE in verify_folder(second)
    assert (second / EVAL_RESULTS_FILE).read_bytes() == (first / EVAL_RESULTS_FILE).read_bytes()
    assert "| gsm8k " in (second / "README.md").read_text(encoding="utf-8")
    OTPruner.from_pretrained(first).save_pretrained(second, overwrite=True)
    verify_folder(second)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stage": "x"}, r"`tasks\[0\]` of the report has the stage 'x'"),
        ({"date": "today"}, r"the date 'today'"),
        ({"value": "1"}, r"`tasks\[0\].value` of the report is '1'"),
        ({"task": ""}, r"`tasks\[0\].task` of the report is ''; want up to 100 characters"),
        ({"num_items": -1}, r"`tasks\[0\].num_items` of the report is -1"),
    ],
)
def test_results_in_a_damaged_report_are_refused(folder, results, changes, message):
    assert run("card", folder, "--lm-eval", results()) == 0
    values = json.loads((folder / "otprune_report.json").read_text())
    values["tasks"][0] |= changes
    with pytest.raises(ReportError, match=message):
        PruningReport.from_dict(values)
