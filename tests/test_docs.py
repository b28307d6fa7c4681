"""Every code block of the README and of docs/ runs, or is read by what would read it.

Python blocks of a page run one after the other in one namespace, in an empty folder, with a tiny model under the name
of the one on the Hub. Lines of `otprune` are read by the real parser, and run after the comment `<!-- run -->`. Blocks
after `<!-- needs network -->` are compiled only, as are those after `<!-- needs trl -->`, which a slow test runs.
"""

import argparse
import ast
import importlib.util
import json
import re
import shlex
import tomllib
import warnings
from pathlib import Path
from typing import NamedTuple

import datasets
import pytest
import torch
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from optimum_otprune import errors
from optimum_otprune.commands.demo_texts import documentation_texts
from optimum_otprune.commands.parser import OTPruneCommand
from optimum_otprune.config.options import OPTIONS
from optimum_otprune.config.presets import METHODS, QUALITIES
from optimum_otprune.functional.costs import costs
from optimum_otprune.functional.importance import importances
from optimum_otprune.functional.marginals import distributions, mixtures, strategies
from optimum_otprune.functional.solvers import solvers
from optimum_otprune.models.architectures import ARCHITECTURES
from optimum_otprune.pruning.calibration import documents
from tests.conftest import run_command
from tests.test_layers import DOORS, FLOORS

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
FINE_TUNE = DOCS / "how-to" / "fine-tune.md"  # has a test that asserts more than that it runs
HUB_ID = "meta-llama/Llama-3.2-1B"
RUN, NETWORK, TRL = "<!-- run -->", "<!-- needs network -->", "<!-- needs trl -->"
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


class Block(NamedTuple):
    language: str
    code: str
    mark: str
    line: int


def blocks(page: Path) -> list[Block]:
    found, mark = [], ""
    for token in MarkdownIt().parse(page.read_text(encoding="utf-8")):
        if token.type == "html_block":
            mark = token.content.strip()
        elif token.type == "fence":
            found.append(Block(token.info.strip(), token.content, mark, token.map[0] + 2))
            mark = ""
        elif token.nesting >= 0:
            mark = ""
    return found


def names(pages: list[Path]) -> list[str]:
    return [str(page.relative_to(ROOT)) for page in pages]


@pytest.fixture(scope="module")
def hooks():
    spec = importlib.util.spec_from_file_location("hooks", DOCS / "hooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory) -> Path:
    """A Llama of 0.2M random parameters that reads the demo model's tokens."""
    folder = tmp_path_factory.mktemp("hub") / HUB_ID
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "optimum_otprune" / "commands" / "demo_model")
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=512,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder.parents[1]


@pytest.fixture
def workplace(stand_in, tmp_path, monkeypatch) -> Path:
    """An empty folder in which the names that the pages use are there: model, texts and the default data set."""
    seen, unseen = documentation_texts("train")[:2], documentation_texts("validation")[:1]
    (tmp_path / HUB_ID.partition("/")[0]).symlink_to(stand_in / HUB_ID.partition("/")[0])
    (tmp_path / "calibration.txt").write_text("\n\n".join(seen)[:3_000], encoding="utf-8")
    (tmp_path / "evaluation.txt").write_text("\n\n".join(unseen)[:3_000], encoding="utf-8")

    def of_hub(path, *args, split, **kwargs):
        assert path == "Salesforce/wikitext"
        return datasets.Dataset.from_dict({"text": [(seen if split == "train" else unseen)[0][:3_000]]})

    monkeypatch.setattr(documents.datasets, "load_dataset", of_hub)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def registries():
    """Functions that a page registers are forgotten after it."""
    kept = [(registry, dict(registry._entries)) for registry in (importances, costs, solvers, distributions, mixtures)]
    tables = [(table, dict(table)) for table in (strategies, ARCHITECTURES)]
    yield
    for registry, entries in kept:
        registry._entries = entries
    for table, entries in tables:
        table.clear()
        table.update(entries)


def has_code(page: Path) -> bool:
    return any(block.language == "python" or block.mark == RUN for block in blocks(page))


@pytest.mark.parametrize("page", names([page for page in PAGES if has_code(page) and page != FINE_TUNE]))
def test_the_code_of_a_page_runs(page, workplace, registries, capsys):
    run_page(page, capsys, without=(NETWORK, TRL))


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="trl is missing")
@pytest.mark.filterwarnings("default")  # of libraries that are not this package's
def test_a_pruned_folder_is_fine_tuned_by_trl_too(workplace, capsys):
    names = run_page(FINE_TUNE, capsys, without=(NETWORK,))
    losses = [entry["loss"] for entry in names["trainer"].state.log_history if "loss" in entry]
    assert len(losses) == 4
    tuned = AutoModelForCausalLM.from_pretrained("llama-sft")
    pruned = AutoModelForCausalLM.from_pretrained("llama-half")
    assert tuned.config.intermediate_size == pruned.config.intermediate_size == 256
    assert not torch.equal(tuned.model.layers[0].mlp.up_proj.weight, pruned.model.layers[0].mlp.up_proj.weight)


def test_a_fine_tuned_folder_is_the_pruned_one_with_other_weights_and_names_it(workplace, capsys):
    names = run_page(FINE_TUNE, capsys, without=(NETWORK, TRL))
    assert names["losses"][-1] < names["losses"][0]
    tuned = AutoModelForCausalLM.from_pretrained("llama-tuned")
    assert tuned.config.intermediate_size == 256
    batch = names["batch"]
    assert torch.allclose(tuned(**batch).logits, names["merged"](**batch).logits, atol=1e-5)
    assert tuned(**batch, labels=batch["input_ids"]).loss.item() < names["losses"][0]
    card = ModelCard.load("llama-tuned/README.md")
    assert card.data.base_model == "you/llama-half"
    assert card.data.base_model_relation == "finetune"
    assert "pruning" in card.data.tags
    assert torch.equal(names["alone"], names["drafted"])


def run_page(page: str | Path, capsys, without: tuple[str, ...]) -> dict[str, object]:
    """Run the code of a page, and return what it named."""
    namespace: dict[str, object] = {"__name__": "__main__"}
    for block in blocks(ROOT / page):
        if block.language == "python" and block.mark not in without:
            code = compile("\n" * (block.line - 1) + block.code, page, "exec")
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", category=UserWarning)
                warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated")  # PEFT 0.21 asks so
                exec(code, namespace)
        elif block.language == "bash" and block.mark == RUN:
            for words in commands(block):
                assert words[0] == "otprune"
                with warnings.catch_warnings():
                    warnings.filterwarnings("ignore", category=UserWarning)
                    assert run_command(*words[1:]) == 0, capsys.readouterr().err
    return namespace


def commands(block: Block) -> list[list[str]]:
    lines = block.code.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def check_otprune(arguments: list[str]) -> None:
    """Read a command line as `otprune` would, and do nothing."""
    parser = argparse.ArgumentParser(prog="otprune", exit_on_error=False)
    subparsers = parser.add_subparsers(required=True)
    for command in OTPruneCommand.SUBCOMMANDS:
        command.subcommand_class.parse_args(subparsers.add_parser(command.name))
    parser.parse_args(arguments)


def check_command(words: list[str]) -> None:
    """Whether a line of a shell names what there is: a command with its options, a target, a script, an extra."""
    program, *rest = words
    if program in ("accelerate", "torchrun"):
        start = rest.index("optimum_otprune")
        assert rest[start - 1] in ("--module", "-m")
        check_otprune(rest[start + 1 :])
    elif program == "otprune":
        check_otprune(rest)
    elif program == "make":
        assert rest[0] in TARGETS
    elif program == "python":
        assert (ROOT / rest[0]).is_file()
    elif program == "pip":
        assert rest[0] == "install"
        asked = re.fullmatch(r"\.(?:\[(.*)\])?", rest[1])
        assert asked
        assert set((asked[1] or "docs").split(",")) <= set(EXTRAS)
    else:
        assert program == "lm_eval"
        folder = ROOT / rest[rest.index("--include_path") + 1]
        assert (folder / f"{rest[rest.index('--tasks') + 1]}.yaml").is_file()


@pytest.mark.parametrize("page", names([page for page in PAGES if blocks(page)]))
def test_every_block_of_a_page_is_read_by_what_would_read_it(page):
    for block in blocks(ROOT / page):
        if block.language == "python":
            ast.parse(block.code)
        elif block.language == "bash":
            for words in commands(block):
                check_command(words)
        elif block.language == "toml":
            tomllib.loads(block.code)
        elif block.language == "json":
            json.loads(block.code)
        else:
            assert block.language in ("math", "text"), f"{page}:{block.line} has no language"


def test_a_wrong_command_is_seen():
    with pytest.raises((SystemExit, argparse.ArgumentError)):
        check_otprune(["prune", HUB_ID, "-o", "out", "--no-such-option"])
    for line in ("make nothing", "python nothing.py", "pip install .[nothing]", "nothing"):
        with pytest.raises(AssertionError):
            check_command(line.split())


def test_every_page_is_in_the_site_and_in_the_list_for_programs():
    listed = (DOCS / "llms.txt").read_text(encoding="utf-8")
    site = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    for page in sorted(DOCS.rglob("*.md")):
        name = page.relative_to(DOCS).as_posix()
        assert f": {name}\n" in site, name
        assert f"]({name})" in listed or name == "index.md", name
    assert set(re.findall(r"\]\(([^)]+)\)", listed)) <= {
        path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")
    }


@pytest.mark.parametrize("page", names(PAGES))
def test_links_between_files_lead_somewhere(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)#]*)(?:#[^)]*)?\)", text):
        if link and not link.startswith("https://"):
            assert ((ROOT / page).parent / link).exists(), link
    for link, anchor in re.findall(r"\]\(([^)#]*\.md|)#([^)]*)\)", text):
        target = (ROOT / page).parent / link if link else ROOT / page
        headings = re.findall(r"^#+ (.*)", target.read_text(encoding="utf-8"), re.MULTILINE)
        assert anchor in [re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings], anchor


def test_the_readme_is_one_page_with_both_commands():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert 90 <= text.count("\n") <= 120
    assert re.search(r"^make demo ", text, re.MULTILINE)
    assert re.search(r"^make test ", text, re.MULTILINE)
    places = [text.index(part) for part in ("smollm2.png", "--quality fast", "## Start", "--target-parameters 70%")]
    assert places == sorted(places)  # what it costs on a real model, and by which command, comes first


def test_the_page_on_architecture_names_every_room_and_every_door():
    text = (DOCS / "architecture.md").read_text(encoding="utf-8")
    for room in [room for floor in FLOORS for room in floor if not room.startswith("__")]:
        assert f"| `{room}/` |" in text or f"| `{room}.py` |" in text, room
    for door in {door for doors in DOORS.values() for door in doors}:
        assert f"`{door}`" in text, door


def test_tables_are_made_from_the_package(hooks):
    configuration = hooks.configuration_table()
    for option in OPTIONS:
        assert f"| `{option.name}` |" in configuration
        assert option.help in configuration
    line = hooks.command_line()
    for command in OTPruneCommand.SUBCOMMANDS:
        assert f"## otprune {command.name}\n" in line
    assert "| `--resume` `[DIR]` |" in line
    presets = hooks.presets_table()
    assert all(f"| `{name}` |" in presets for name in [*METHODS, *QUALITIES])
    assert "\n| `fast` |" in presets
    registered = hooks.registered_tables()
    for registry in (importances, costs, solvers, distributions, mixtures):
        assert all(f"| `{name}` |" in registered for name in registry.names())
    assert all(f"| `{name}` |" in registered for name in strategies)
    families = hooks.families_table()
    assert all(
        (f"| `{name}` |" in families) == (spec.size_key is not None and not spec.is_reused)
        for name, spec in ARCHITECTURES.items()
    )
    listed = hooks.errors_table()
    classes = [
        value for value in vars(errors).values() if isinstance(value, type) and value.__module__ == errors.__name__
    ]
    assert len(classes) > 20
    assert all(f"| `{error.__name__}` |" in listed for error in classes)


def test_bars_in_a_table_separate_no_cells(hooks):
    assert hooks.table(["a"], [["`|x|` or |"]]) == "| a |\n| --- |\n| `|x|` or \\| |\n"


@pytest.mark.parametrize("page", names([page for page in PAGES if "<!-- generated: " in page.read_text("utf-8")]))
def test_a_page_that_is_read_without_a_build_says_where_its_tables_are(page):
    paragraphs = (ROOT / page).read_text(encoding="utf-8").split("\n\n")
    for before, place in zip(paragraphs, paragraphs[1:], strict=False):
        if place.startswith("<!-- generated: "):
            assert "made when the site is built (`make docs`)" in before


def test_a_place_for_a_table_that_nobody_makes_is_an_error(hooks):
    assert hooks.with_generated("a <!-- generated: errors --> b").startswith("a | error |")
    with pytest.raises(KeyError, match="nothing"):
        hooks.with_generated("<!-- generated: nothing -->")
    used = {name for page in PAGES for name in re.findall(r"<!-- generated: ([a-z ]+) -->", page.read_text("utf-8"))}
    assert used == set(hooks.GENERATED)
