"""What the examples that train a small model share: data, tokenizer, the trigram model beside it, and the training.

The tokenizer and the weights are made from `documentation_texts("train")`; perplexity is measured on
`documentation_texts("validation")`, beside that of an interpolated Kneser-Ney trigram model on the same tokens.
"""

import argparse
import math
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from optimum_otprune.commands.demo_texts import documentation_texts

WINDOW = 256
BOS, EOS = "<s>", "</s>"


def train_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE, as in Llama 3."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[BOS, EOS], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        model_max_length=WINDOW * 2,
        clean_up_tokenization_spaces=False,
    )


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> torch.Tensor:
    """All documents as one stream of token ids, each ended by the end-of-sequence token."""
    ids = [tokenizer(text, verbose=False)["input_ids"] + [tokenizer.eos_token_id] for text in texts]
    return torch.tensor([token for document in ids for token in document])


class KneserNeyTrigram:
    """Interpolated Kneser-Ney trigram model with one discount per order (Chen and Goodman, 1999, section 3)."""

    def __init__(self, tokens: list[int], vocab_size: int):
        self.trigrams = Counter(zip(tokens, tokens[1:], tokens[2:]))
        self.bigrams = Counter((b, c) for _, b, c in self.trigrams)  # continuation counts
        self.unigrams = Counter(c for _, c in self.bigrams)
        self.vocab_size = vocab_size
        self.orders = [self._contexts(self.trigrams), self._contexts(self.bigrams)]
        self.discounts = [self._discount(self.trigrams), self._discount(self.bigrams), self._discount(self.unigrams)]
        self.total_unigrams = sum(self.unigrams.values())

    @staticmethod
    def _contexts(counts: Counter) -> dict:
        totals: dict = defaultdict(lambda: [0, 0])
        for gram, count in counts.items():
            entry = totals[gram[:-1]]
            entry[0] += count
            entry[1] += 1
        return totals

    @staticmethod
    def _discount(counts: Counter) -> float:
        of_counts = Counter(counts.values())
        if not of_counts[1]:  # too few tokens to estimate it from
            return 0.75
        return of_counts[1] / (of_counts[1] + 2 * of_counts[2])

    def probability(self, a: int, b: int, c: int) -> float:
        discount = self.discounts[2]
        p = max(self.unigrams[c] - discount, 0) / self.total_unigrams
        p += discount * len(self.unigrams) / self.total_unigrams / self.vocab_size
        for counts, context, contexts, order in (
            (self.bigrams, (b,), self.orders[1], 1),
            (self.trigrams, (a, b), self.orders[0], 0),
        ):
            if context in contexts:
                total, distinct = contexts[context]
                discount = self.discounts[order]
                p = max(counts[(*context, c)] - discount, 0) / total + discount * distinct / total * p
        return p

    def perplexity(self, windows: torch.Tensor) -> float:
        """Over the same tokens as the language model's: all but the first of each window."""
        nll = count = 0
        for window in windows.tolist():
            for i in range(1, len(window)):
                nll -= math.log(self.probability(window[i - 2] if i > 1 else -1, window[i - 1], window[i]))
                count += 1
        return math.exp(nll / count)


@torch.no_grad()
def perplexity(model: PreTrainedModel, windows: torch.Tensor) -> float:
    model.eval()
    losses = [model(input_ids=batch, labels=batch).loss.item() * len(batch) for batch in windows.split(16)]
    model.train()
    return math.exp(sum(losses) / len(windows))


def add_dropout(model: PreTrainedModel, rate: float) -> None:
    """Llama and Qwen2-MoE have dropout in attention alone; half a million tokens want it on every residual branch."""

    def drop(module: torch.nn.Module, _: tuple, output: torch.Tensor | tuple) -> torch.Tensor | tuple:
        if isinstance(output, tuple):
            return (torch.nn.functional.dropout(output[0], rate, module.training), *output[1:])
        return torch.nn.functional.dropout(output, rate, module.training)

    model.model.embed_tokens.register_forward_hook(drop)
    for layer in model.model.layers:
        layer.self_attn.register_forward_hook(drop)
        layer.mlp.register_forward_hook(drop)


def train(
    model: PreTrainedModel, stream: torch.Tensor, validation: torch.Tensor, args: argparse.Namespace, **forward: bool
) -> dict:
    """Return the weights with the best validation perplexity; `forward` are options of the model's call."""
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": args.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.learning_rate, betas=(0.9, 0.98))
    steps = args.epochs * (len(stream) // WINDOW) // args.batch_size
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.learning_rate, total_steps=steps, pct_start=0.1)
    generator = torch.Generator().manual_seed(args.seed)
    best, best_weights, start = math.inf, None, time.perf_counter()
    for step in range(1, steps + 1):
        offsets = torch.randint(len(stream) - WINDOW, (args.batch_size,), generator=generator)
        batch = torch.stack([stream[offset : offset + WINDOW] for offset in offsets])
        loss = model(input_ids=batch, labels=batch, **forward).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % args.evaluate_every == 0 or step == steps:
            current = perplexity(model, validation)
            print(
                f"step {step}/{steps}  loss {loss.item():.3f}  validation perplexity {current:.2f}  "
                f"{time.perf_counter() - start:.0f} s ({time.process_time():.0f} s of processor time)",
                flush=True,
            )
            if current < best:
                best, best_weights = current, {name: p.detach().clone() for name, p in model.state_dict().items()}
    return best_weights


def arguments(description: str, **defaults: float) -> argparse.ArgumentParser:
    """The options that every training has, with what differs from the small Llama's."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--vocab-size", type=int, default=2048)
    parser.add_argument("--hidden-size", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--epochs", type=int, default=13)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--evaluate-every", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.set_defaults(**defaults)
    return parser


def common_config(tokenizer: PreTrainedTokenizerFast, args: argparse.Namespace) -> dict:
    """The fields that the configurations of these models share."""
    return {
        "vocab_size": args.vocab_size,
        "hidden_size": args.hidden_size,
        "num_hidden_layers": args.layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": WINDOW * 2,
        "tie_word_embeddings": True,
        "attention_dropout": args.dropout,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }


def train_and_save(
    build: Callable[[PreTrainedTokenizerFast], PreTrainedModel], args: argparse.Namespace, **forward: bool
) -> None:
    """Make the tokenizer, train the model that `build` makes, print its perplexity, and save both in bfloat16."""
    torch.manual_seed(args.seed)
    texts = documentation_texts("train")
    tokenizer = train_tokenizer(texts, args.vocab_size)
    stream = encode(tokenizer, texts)
    validation = encode(tokenizer, documentation_texts("validation"))
    validation = validation[: len(validation) // WINDOW * WINDOW].view(-1, WINDOW)
    print(f"{len(stream)} training tokens, {validation.numel()} validation tokens")
    trigram = KneserNeyTrigram(stream.tolist(), args.vocab_size).perplexity(validation)
    print(f"trigram (interpolated Kneser-Ney) validation perplexity {trigram:.2f}", flush=True)

    model = build(tokenizer)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters")
    add_dropout(model, args.dropout)
    model.load_state_dict(train(model, stream, validation, args, **forward))
    model.config.attention_dropout = 0.0
    model.to(torch.bfloat16).float()  # measured as it is saved
    print(f"{type(model).__name__} validation perplexity {perplexity(model, validation):.2f}")
    print(f"trigram validation perplexity {trigram:.2f}")
    model.to(torch.bfloat16).save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)
