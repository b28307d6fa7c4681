"""What a card says of recovery."""

from optimum_otprune.checkpoints.card.render import model_card
from optimum_otprune.config.configuration import OTPruningConfig
from tests.checkpoints.card.test_render import assert_harmless, words
from tests.hostile import HOSTILE
from tests.reports import CALIBRATION, make_recovery, make_report

CONFIG = OTPruningConfig(pruning_ratio=0.5)


def test_a_card_tells_of_recovery_with_what_it_cost_and_gave_on_each_kind_of_text():
    card = model_card(CONFIG, make_report(recoveries=(make_recovery(),)), "user/small")
    text = words(card)
    assert "then trained towards the dense model's own predictions (recovery)" in text
    assert "(distillation, KL divergence), without labels" in text
    assert "FFN weights (300) on 18,000 tokens in 12 seconds" in text
    assert "the weights after step 9 of 10" in text
    assert "user/text, held out of training 0.200 0.100 60.0 % 70.0 % 12.50 20.00 15.00 4 × 100" in text
    assert "otprune recover small --base meta-llama/Llama-3.2-1B -o small-recovered" in text
    assert "--num-tokens 20000 --trained ffn --learning-rate 0.001 --batch-tokens 2000 --seed 0" in text.replace(
        "\\ ", ""
    )
    assert "not fine-tuned on a task" in text
    assert "Hinton et al., 2015" in text
    assert "Distilling the Knowledge in a Neural Network" in card


def test_a_card_of_a_model_that_was_not_recovered_says_nothing_of_it():
    text = words(model_card(CONFIG, make_report(), "user/small"))
    assert "ecovery" not in text
    assert "without fine-tuning" in text


def test_samples_that_the_dense_model_wrote_are_told_if_there_are_any():
    def told(written):
        recovery = make_recovery(samples={"given": 10, "written": written})
        return "wrote itself" in words(
            model_card(CONFIG, make_report(recoveries=(recovery,), calibration=CALIBRATION), "small")
        )

    assert told(4)
    assert not told(0)


def test_nothing_gained_is_said():
    report = make_report(recoveries=(make_recovery(kept_step=0),))
    assert "Nothing got better on held-out text" in words(model_card(CONFIG, report, "small"))


def test_strings_of_a_recovery_never_become_structure():
    for text in HOSTILE:
        recovery = make_recovery(data=text, trained=text, samples={text: 1})
        assert_harmless(model_card(CONFIG, make_report(recoveries=(recovery,)), "small"))
