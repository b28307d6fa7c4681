"""Streaming, scoring and evaluation give what the whole model gives, wherever its weights are."""

import hashlib
import math

import pytest
import torch
from accelerate import cpu_offload
from transformers import AutoModelForCausalLM

from optimum_otprune import OTPruner
from optimum_otprune.config.configuration import OTPruningConfig
from optimum_otprune.errors import NumericalError
from optimum_otprune.functional import distillation
from optimum_otprune.functional.gram import gram_statistics
from optimum_otprune.models import perplexity
from optimum_otprune.models.block_runner import BlockRunner
from optimum_otprune.models.devices import execution_device, read_parameter, replace_parameter
from optimum_otprune.models.faithfulness import measured_factors
from optimum_otprune.models.find_ffns import ffn_blocks
from optimum_otprune.models.forward_stream import CalibrationStream
from optimum_otprune.models.perplexity import TokenPerplexity, evaluate_perplexity
from optimum_otprune.models.prunable_model import PrunableModel
from optimum_otprune.pruning.calibration.gradients import Asked, layer_gradients
from optimum_otprune.pruning.calibration.layer_statistics import LayerData, measure_rescue, residual_token_weights
from optimum_otprune.pruning.calibration.samples import Samples, heldout_mask
from tests.conftest import VOCAB_SIZE, make_llama
from tests.models.test_contract import build
from tests.passes import moments_of, passes_of, quiet, scores_of, stream_of

MAP = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
DISK = MAP | {"model.layers.0": "cpu", "model.layers.1": "disk", "model.layers.2": "disk"}


@pytest.fixture
def offloaded(llama_folder, tmp_path):
    return AutoModelForCausalLM.from_pretrained(llama_folder, device_map=DISK, offload_folder=tmp_path / "offload")


def streamed(stream: CalibrationStream) -> torch.Tensor:
    return torch.cat([stored.load() for stored in stream._hidden])


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "gpt_neox", "opt"])
def test_streamed_hidden_states_are_the_models_own(name, tokens):
    model = build(name)
    blocks = ffn_blocks(model)
    with torch.no_grad():
        expected = model(input_ids=tokens, output_hidden_states=True).hidden_states
    stream = stream_of(model, tokens, batch_size=5, track_dense=True)  # 5 + 5 + 2: an uneven last batch
    for block in blocks[:-1]:  # behind the last block the model has its final norm
        stream.energies(block)
        assert all(not tap.missing.any() for tap in stream.taps(block))  # nothing was pruned yet
        stream.advance(block)
        torch.testing.assert_close(streamed(stream), expected[block.layer + 1], rtol=1e-4, atol=1e-5)


def test_corrections_are_what_is_missing_to_the_dense_hidden_states(llama, tokens):
    blocks = ffn_blocks(llama)
    with torch.no_grad():
        dense = llama(input_ids=tokens, output_hidden_states=True).hidden_states
    stream = stream_of(llama, tokens, batch_size=4, track_dense=True)
    stream.energies(blocks[0])
    blocks[0].install(blocks[0].read().select(torch.arange(10)))
    stream.advance(blocks[0])
    stream.energies(blocks[1])
    missing = torch.cat([tap.missing for tap in stream.taps(blocks[1])]).view(12, 20, 32)
    stream.advance(blocks[1])
    torch.testing.assert_close(streamed(stream) + missing, dense[2], rtol=1e-4, atol=1e-5)


def test_a_stream_over_offloaded_layers_equals_the_plain_one(llama, offloaded, tokens):
    inputs = []
    for model in (llama, offloaded):
        blocks = ffn_blocks(model)
        stream = stream_of(model, tokens, batch_size=6)
        inputs.append(
            [torch.cat([tap.inputs for tap in stream.taps(block)]) for block in blocks if not stream.advance(block)]
        )
    for one, other in zip(*inputs):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_hooks_are_gone_after_an_exception(llama, tokens):
    blocks = ffn_blocks(llama)
    stream = stream_of(llama, tokens, batch_size=6)
    blocks[0].projection("down").weight = torch.nn.Parameter(torch.zeros(3, 3))
    with pytest.raises(RuntimeError):
        list(stream.taps(blocks[0]))
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in llama.modules())


def scores_by_autograd(model, tokens, batch_size, fo: bool):
    """Weight × gradient of the literal definitions, by the whole model's own backward pass."""
    for batch in tokens.split(batch_size):
        if not fo:
            model(input_ids=batch, labels=batch).loss.backward()
            continue
        values = []

        def note(module, args, output, values=values):
            if isinstance(output, torch.Tensor):
                values.append(torch.linalg.svdvals(output.reshape(len(output), -1)).mean())

        handles = [module.register_forward_hook(note) for module in model.modules() if module is not model]
        model(input_ids=batch)
        sum(values).backward()
        [handle.remove() for handle in handles]
    count = len(tokens.split(batch_size))
    return [
        {
            name: getattr(layer.mlp, f"{name}_proj").weight * getattr(layer.mlp, f"{name}_proj").weight.grad / count
            for name in ("gate", "up", "down")
        }
        for layer in model.model.layers
    ]


@pytest.mark.parametrize("kind", ["snip", "fo"])
@pytest.mark.parametrize("where", ["plain", "disk"])
def test_scores_are_weight_times_the_whole_models_gradient(llama, offloaded, tokens, kind, where):
    model = llama if where == "plain" else offloaded
    found = scores_of(model, tokens, 6)
    expected = scores_by_autograd(make_llama(), tokens, 6, fo=kind == "fo")
    for scores, wanted in zip(found, expected):
        got = getattr(scores, kind)
        for name, matrix in (("gate", got.gate), ("up", got.up), ("down", got.down.T)):
            difference = torch.linalg.norm(matrix - wanted[name].detach())
            assert float(difference / torch.linalg.norm(wanted[name].detach())) <= 1e-6


def test_scoring_leaves_the_model_as_it_was(llama, tokens):
    llama.train()
    llama.model.norm.weight.requires_grad_(False)
    wanted = {name: parameter.requires_grad for name, parameter in llama.named_parameters()}
    scores_of(llama, tokens, 6)
    assert {name: parameter.requires_grad for name, parameter in llama.named_parameters()} == wanted
    assert llama.training
    assert all(parameter.grad is None for parameter in llama.parameters())
    assert not any(module._forward_hooks for module in llama.modules())


def test_a_nan_output_names_its_module_while_scoring(llama, tokens):
    with torch.no_grad():
        llama.model.layers[1].input_layernorm.weight[0] = float("nan")
    with pytest.raises(NumericalError, match=r"The output of module 'model.layers.1.input_layernorm' is NaN"):
        scores_of(llama, tokens, 6)


@pytest.mark.parametrize(("num_samples", "seqlen"), [(1, 2), (1, 20), (3, 7), (4, 5), (128, 16)])
@pytest.mark.parametrize("share", [0.01, 0.25, 0.5])
def test_both_sides_of_the_held_out_split_have_tokens(num_samples, seqlen, share):
    mask = heldout_mask(num_samples, seqlen, share, seed=0)
    assert 0 < int(mask.sum()) < num_samples * seqlen
    assert torch.equal(mask, heldout_mask(num_samples, seqlen, share, seed=0))
    if num_samples >= 4:  # whole samples
        assert all(row.all() or not row.any() for row in mask.view(num_samples, seqlen))


def test_layer_statistics_are_those_of_the_modules_own_activations(llama, tokens):
    block = ffn_blocks(llama)[1]
    stream = stream_of(llama, tokens, batch_size=5)
    stream.advance(ffn_blocks(llama)[0])
    is_heldout = heldout_mask(12, 20, 0.25, seed=0)
    config = OTPruningConfig(pruning_ratio=0.5, token_weighting="uniform")
    found = LayerData.of(block, block.read(), stream, is_heldout, config).statistics
    seen = []
    block.projection("down").register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        llama(input_ids=tokens)
    hidden = seen[0].reshape(-1, 48)
    expected = gram_statistics(hidden, hidden @ block.read().down.T)
    torch.testing.assert_close(found[0].gram + found[1].gram, expected.gram, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found[0].cross + found[1].cross, expected.cross, rtol=1e-3, atol=1e-3)
    assert found[1].num_tokens == 60


def test_a_parameter_is_replaced_wherever_it_is(llama_folder, offloaded, tokens):
    kept = torch.arange(0, 48, 2)

    def checksum() -> str:
        return hashlib.sha256((llama_folder / "model.safetensors").read_bytes()).hexdigest()

    before = checksum()
    results = []
    in_memory = AutoModelForCausalLM.from_pretrained(llama_folder)
    on_cpu = cpu_offload(AutoModelForCausalLM.from_pretrained(llama_folder), execution_device=torch.device("cpu"))
    for model in (in_memory, offloaded, on_cpu):
        for block in ffn_blocks(model):
            for name, dim in (("gate", 0), ("up", 0), ("down", 1)):
                module = block.projection(name)
                weight = read_parameter(module, "weight")
                replace_parameter(module, "weight", weight.index_select(dim, kept))
                assert read_parameter(module, "weight").shape[dim] == 24
        with torch.no_grad():
            results.append(model(input_ids=tokens).logits)
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)
    torch.testing.assert_close(results[2], results[0], rtol=0, atol=0)
    assert checksum() == before
    assert execution_device(ffn_blocks(offloaded)[2].module) == torch.device("cpu")
    assert read_parameter(ffn_blocks(offloaded)[2].up, "bias") is None


def test_perplexity_is_the_plain_loops(llama, tokens):
    nll, count = 0.0, 0
    with torch.no_grad():
        for window in tokens:
            log_probabilities = torch.log_softmax(llama(input_ids=window[None]).logits[0].double(), dim=-1)
            for position in range(1, len(window)):
                nll -= float(log_probabilities[position - 1, window[position]])
                count += 1
    for batch_size in (1, 5, 12):
        metrics = evaluate_perplexity(llama, tokens, batch_size, progress=False)
        assert math.isclose(metrics["perplexity"], math.exp(nll / count), rel_tol=1e-5)
        assert metrics["num_tokens"] == count == 12 * 19
    assert (metrics["num_windows"], metrics["seqlen"], metrics["stride"], metrics["dtype"]) == (12, 20, 20, "float32")


def test_a_model_that_knows_nothing_has_the_vocabulary_as_its_perplexity(llama, tokens):
    with torch.no_grad():
        llama.lm_head.weight.zero_()
    assert math.isclose(evaluate_perplexity(llama, tokens, progress=False)["perplexity"], VOCAB_SIZE, rel_tol=1e-5)


def test_nan_outputs_are_an_error(llama, tokens):
    with torch.no_grad():
        llama.lm_head.weight[0, 0] = float("nan")
    with pytest.raises(NumericalError, match="log-likelihoods are NaN"):
        evaluate_perplexity(llama, tokens, progress=False)


def test_the_metric_adds_up_over_batches_and_overflows_to_infinity():
    metric = TokenPerplexity(keep_in_memory=True)
    metric.add_batch(predictions=[2.0], references=[1])
    metric.add_batch(predictions=[4.0], references=[2])
    assert metric.compute() == {"perplexity": math.exp(2.0), "nll": 2.0, "num_tokens": 3}
    assert TokenPerplexity(keep_in_memory=True).compute(predictions=[1e6], references=[1])["perplexity"] == math.inf


def test_gradient_moments_are_those_of_the_loss_by_the_ffn_outputs(llama, tokens):
    outputs = []
    handles = [
        layer.mlp.register_forward_hook(lambda module, args, output: outputs.append(output) or output.retain_grad())
        for layer in llama.model.layers
    ]
    llama(input_ids=tokens, labels=tokens).loss.backward()
    for handle in handles:
        handle.remove()
    moments = moments_of(llama, tokens, 12)
    for moment, output in zip(moments, outputs, strict=True):
        rows = output.grad.flatten(end_dim=1).double() * tokens.numel()
        torch.testing.assert_close(moment, rows.T @ rows, rtol=1e-5, atol=1e-8)


def test_gradient_moments_depend_neither_on_the_batch_size_nor_on_the_placement(llama, offloaded, tokens):
    moments = moments_of(llama, tokens, 12)
    for model, batch_size in ((llama, 5), (offloaded, 12)):
        others = moments_of(model, tokens, batch_size)
        for moment, other in zip(moments, others, strict=True):
            torch.testing.assert_close(other, moment, rtol=1e-4, atol=1e-6 * float(moment.abs().max()))


def test_a_nan_in_the_gradients_names_the_layer(llama, tokens):
    llama.model.layers[1].register_forward_hook(
        lambda module, args, output: (
            output.register_hook(lambda gradient: gradient * float("nan")) and None if output.requires_grad else None
        )
    )
    with pytest.raises(NumericalError, match="Layer 1: the gradient by the FFN's output is NaN"):
        moments_of(llama, tokens, 12)


def test_scores_and_moments_of_one_walk_are_those_of_two(llama, tokens):
    both = layer_gradients(passes_of(llama, tokens, 5), Asked(scores=True, moments=True))
    for one, other in zip(both.scores, scores_of(llama, tokens, 5), strict=True):
        assert all(torch.equal(*pair) for pair in zip((*one.snip, *one.fo), (*other.snip, *other.fo), strict=True))
    assert all(torch.equal(*pair) for pair in zip(both.moments, moments_of(llama, tokens, 5), strict=True))


def test_token_ids_enter_the_model_once_for_each_pass(llama, tokens, monkeypatch):
    entered, note = [], BlockRunner._note_calls
    monkeypatch.setattr(
        BlockRunner, "_note_calls", lambda runner, behind: entered.append(len(runner._batches)) or note(runner, behind)
    )
    options = {
        "importance": "fo_snip",
        "selection": "top",
        "allocation": "adaptive",
        "score_batch_size": 6,
        "self_calibration": 0,
    }
    pruner = OTPruner.from_pretrained(llama, OTPruningConfig(pruning_ratio=0.5, multiple_of=1, **options))
    pruner.prune(tokens, batch_size=4, progress=False)
    assert entered == [2, 2, 3, 3]  # the check's two batches; gradients; removal costs; layers


def test_samples_that_follow_keep_what_is_held_out_and_one_process_owns_all(tokens):
    samples = Samples.split(tokens, 0.25, seed=0)
    longer = samples.followed_by(Samples.split(tokens[:4], 0.5, seed=0))
    assert int(samples.is_heldout.sum()) == 60
    assert int(longer.is_heldout[tokens.numel() :].sum()) == 40
    assert torch.equal(longer.is_heldout[: tokens.numel()], samples.is_heldout)
    assert all(torch.equal(*pair) for pair in zip(longer.own(together=4), longer))


def test_tokens_count_by_the_inverse_of_the_hidden_states_squared_norm():
    energy, is_heldout = torch.tensor([1.0, 2.0, 4.0, 1.0, 0.0]), torch.tensor([False, False, False, True, True])
    weights, unit = residual_token_weights(energy, is_heldout)
    torch.testing.assert_close(weights[0] / weights[1], torch.tensor(2.0))
    torch.testing.assert_close(weights[0] / weights[2], torch.tensor(4.0))
    torch.testing.assert_close(weights[4] / weights[3], torch.tensor(100.0))  # counts as a tenth of the median's norm
    torch.testing.assert_close(weights[~is_heldout].mean(), torch.tensor(1.0))
    torch.testing.assert_close(weights[is_heldout].mean(), torch.tensor(1.0))
    assert unit == pytest.approx((1 + 100) / 2)


def test_where_hidden_states_are_zero_all_tokens_count_the_same():
    weights, unit = residual_token_weights(torch.zeros(4), torch.arange(4) == 3)
    assert torch.equal(weights, torch.ones(4))
    assert unit == 1.0


def test_a_token_of_weight_two_counts_as_two_tokens():
    hidden, targets = torch.randn(5, 4, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
    weighted = gram_statistics(hidden, targets, torch.tensor([1.0, 2.0, 1.0, 1.0, 1.0], dtype=torch.float64))
    twice = torch.tensor([0, 1, 1, 2, 3, 4])
    doubled = gram_statistics(hidden[twice], targets[twice])
    for one, other in zip(weighted[:-1], doubled[:-1]):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(("name", "adds"), [("llama", True), ("gpt2", True), ("gpt_neox", True), ("gemma2", False)])
def test_the_ffn_alone_is_run_where_the_block_adds_its_output(name, adds, tokens):
    model = build(name)
    prunable = PrunableModel.of(model)
    blocks, prunable = prunable.blocks, prunable.checked(measured_factors(prunable, tokens))
    streams = [CalibrationStream(prunable, tokens, quiet(5)) for _ in range(2)]
    list(streams[0].taps(blocks[0]))
    assert (streams[0]._ffn_inputs is not None) == adds
    blocks[0].install(blocks[0].read().select(torch.arange(10)))
    for stream in streams:
        stream.advance(blocks[0])
    torch.testing.assert_close(streamed(streams[0]), streamed(streams[1]), rtol=1e-5, atol=1e-6)


def test_rescue_is_measured_with_the_weights_that_the_fit_has(llama, tokens):
    """Of each layer relative to its hidden states, so that layers can be added up."""
    blocks, is_heldout = ffn_blocks(llama), heldout_mask(12, 20, 0.25, seed=0)
    config, kept = OTPruningConfig(pruning_ratio=0.5), torch.arange(24)
    stream = stream_of(llama, tokens, batch_size=5)
    dense = blocks[0].read()
    energy = stream.energies(blocks[0])
    data = LayerData.of(blocks[0], dense, stream, is_heldout, config)
    assert data.weight_unit == pytest.approx(float((1 / energy[is_heldout]).mean()), rel=1e-3)
    [measured] = measure_rescue(data, [dense.select(kept)], kept)
    outputs = torch.cat([batch.outputs for batch in data.batches(only_heldout=True)])
    assert measured.output == pytest.approx(float((outputs.square().sum(1) / energy[is_heldout]).sum()), rel=1e-3)
    uniform = LayerData.of(
        blocks[0],
        dense,
        stream_of(llama, tokens, batch_size=5),
        is_heldout,
        config.replace(token_weighting="uniform"),
    )
    assert uniform.weight_unit == 1.0
    [plain] = measure_rescue(uniform, [dense.select(kept)], kept)
    assert plain.output == pytest.approx(float(outputs.square().sum()), rel=1e-5)


def test_few_windows_of_a_large_vocabulary_go_through_the_model_at_once_and_count_the_same(llama, tokens, monkeypatch):
    sizes = []
    llama.register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    whole = evaluate_perplexity(llama, tokens, 8, progress=False)
    monkeypatch.setattr(perplexity, "_LOGIT_BYTES", 3 * tokens.shape[1] * VOCAB_SIZE * 4)
    monkeypatch.setattr(distillation, "CHUNK_BYTES", 7 * VOCAB_SIZE * 4)  # log-probabilities of seven tokens at a time
    in_pieces = evaluate_perplexity(llama, tokens, 8, progress=False)
    assert sizes == [8, 4, 3, 3, 3, 3]
    assert math.isclose(whole.pop("nll"), in_pieces.pop("nll"), rel_tol=1e-6)
    assert math.isclose(whole.pop("perplexity"), in_pieces.pop("perplexity"), rel_tol=1e-6)
    assert whole == in_pieces
