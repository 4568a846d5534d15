"""Train one model of the bundled pair: `python -m r2r_glimp.abacus.train --size llm`.

Plain next-token training on fresh problems of the train split, loss on the solution only. Batches
are a function of (seed, step), so a run that was killed goes on from its last state file and ends
where an undisturbed one would.
"""

import argparse
import os
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from r2r_glimp.abacus.problems import (
    CONNECTIVES,
    LEVELS,
    RESULTS,
    Problem,
    is_correct,
    make_problem,
    problems,
)
from r2r_glimp.abacus.tokenizer import build_tokenizer


@dataclass(frozen=True, slots=True)
class Recipe:
    """Shape of a model and what its training takes by default.

    `products` bounds the products it ever sees: no two factors both above it. A small model has
    seen less of the world; products by 0 and 1 are all that the SLM knows.
    """

    hidden_size: int
    intermediate_size: int
    num_layers: int
    products: int
    steps: int
    learning_rate: float


RECIPES = {
    "slm": Recipe(64, 96, num_layers=3, products=1, steps=4000, learning_rate=2e-3),
    "llm": Recipe(128, 384, num_layers=4, products=9, steps=4000, learning_rate=1.5e-3),
}
HEAD_DIM = 32
RECITALS = 0.5  # share of recitals at the beginning; they end at twice the curriculum
POOL = 8  # batches drawn together and cut by length, so that little is padded


def build_model(size: str, tokenizer: PreTrainedTokenizerFast, seed: int) -> Qwen3ForCausalLM:
    torch.manual_seed(seed)
    recipe = RECIPES[size]
    config = Qwen3Config(
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.intermediate_size,
        num_hidden_layers=recipe.num_layers,
        vocab_size=-(-len(tokenizer) // 32) * 32,
        num_attention_heads=recipe.hidden_size // HEAD_DIM,
        num_key_value_heads=recipe.hidden_size // HEAD_DIM // 2,
        head_dim=HEAD_DIM,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    return Qwen3ForCausalLM(config)


def chat_prompt(content: str, tokenizer: PreTrainedTokenizerFast) -> str:
    """One user turn, thinking opened."""
    message = {"role": "user", "content": content}
    return str(tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True))


def draw_problem(rng: random.Random, levels: Sequence[int], products: int) -> Problem:
    """A problem of the train split, of any of the levels and without harder products."""
    while True:
        problem = make_problem(rng, rng.choice(levels))
        if problem.split() == "train" and problem.hardest_product() <= products:
            return problem


def make_example(
    rng: random.Random, progress: float, curriculum: float, products: int
) -> tuple[str, str]:
    """A prompt and its response. Early in a run problems are easy and many only ask to recite.

    Finding a definition again is what small models learn last and everything else rests on;
    reciting teaches just that.
    """
    hardest = 1 + int(len(LEVELS) * min(1.0, progress / curriculum))
    problem = draw_problem(rng, LEVELS[:hardest], products)
    if rng.random() < RECITALS * (1 - progress / (2 * curriculum)):
        return problem.recital(rng)
    return problem.prompt(), problem.solution(rng)


def token_weights(tokens: list[str]) -> list[float]:
    """How much each token of a response counts: little where any wording is right."""
    free = {f"Ġ{word}" for word in (*RESULTS, *CONNECTIVES)}
    return [0.1 if token in free else 1.0 for token in tokens]


def make_batch(
    step: int, args: argparse.Namespace, tokenizer: PreTrainedTokenizerFast
) -> tuple[torch.Tensor, torch.Tensor]:
    """`input_ids` int64 and loss weights float32 of one step, [batch, longest]; 0 on prompts."""
    rng = random.Random(f"abacus-{args.seed}-{step // POOL}")
    pairs = [
        make_example(rng, step / args.steps, args.curriculum, RECIPES[args.size].products)
        for _ in range(POOL * args.batch)
    ]
    prompts = tokenizer([chat_prompt(p, tokenizer) for p, _ in pairs])["input_ids"]
    responses = tokenizer([r + tokenizer.eos_token for _, r in pairs])["input_ids"]
    rows = sorted(zip(prompts, responses, strict=True), key=lambda row: len(row[0]) + len(row[1]))
    chunks = [rows[i : i + args.batch] for i in range(0, len(rows), args.batch)]
    rng.shuffle(chunks)
    chunk = chunks[step % POOL]
    longest = max(len(p) + len(r) for p, r in chunk)
    ids = torch.full((args.batch, longest), tokenizer.pad_token_id)
    weights = torch.zeros(args.batch, longest)
    for i, (p, r) in enumerate(chunk):
        end = len(p) + len(r)
        ids[i, :end] = torch.tensor(p + r)
        weights[i, len(p) : end] = torch.tensor(
            token_weights([str(t) for t in tokenizer.convert_ids_to_tokens(r)])
        )
    return ids, weights


def learning_rate(step: int, args: argparse.Namespace) -> float:
    """Warm-up, plateau, linear decay to zero over the last part of the run."""
    warm = min(1.0, (step + 1) / 200)
    cool = min(1.0, (args.steps - step) / (args.decay * args.steps))
    return args.lr * warm * cool


@torch.no_grad()
def accuracy(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, num_problems: int
) -> dict[int, float]:
    """Greedy accuracy on validation problems, by level."""
    model.eval()
    right: dict[int, list[bool]] = {}
    sample = list(islice(problems("validation", levels=LEVELS), num_problems))
    for problem in sample:
        ids = tokenizer(chat_prompt(problem.prompt(), tokenizer), return_tensors="pt")["input_ids"]
        out: Any = model.generate(  # type: ignore[misc]
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=160
        )
        text = str(tokenizer.decode(out[0, ids.shape[1] :]))
        right.setdefault(problem.level, []).append(is_correct(problem, text))
    model.train()
    return {level: sum(r) / len(r) for level, r in sorted(right.items())}


def save_state(
    path: Path, step: int, model: torch.nn.Module, optimizer: torch.optim.Optimizer
) -> None:
    tensors = {f"model.{k}": v for k, v in model.named_parameters()}
    for name, parameter in model.named_parameters():
        tensors |= {f"{key}.{name}": value for key, value in optimizer.state[parameter].items()}
    partial = path.with_suffix(".partial")
    save_file({k: v.detach().clone() for k, v in tensors.items()}, partial, {"step": str(step)})
    os.replace(partial, path)


def load_state(path: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> int:
    with safe_open(path, "pt") as state:
        for name, parameter in model.named_parameters():
            parameter.data.copy_(state.get_tensor(f"model.{name}"))
            optimizer.state[parameter] = {
                key: state.get_tensor(f"{key}.{name}") for key in ("step", "exp_avg", "exp_avg_sq")
            }
        return int(state.metadata()["step"])


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m r2r_glimp.abacus.train", description=__doc__)
    parser.add_argument("--size", choices=RECIPES, required=True)
    parser.add_argument("--out", type=Path, help="export folder (default: checkpoints/abacus-SIZE)")
    parser.add_argument(
        "--run_dir", type=Path, default=Path("runs/abacus"), help="resume state lives here"
    )
    parser.add_argument("--steps", type=int, help="by default the recipe's")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lr", type=float, help="by default the recipe's")
    parser.add_argument(
        "--decay", type=float, default=0.7, help="share of the run with a falling learning rate"
    )
    parser.add_argument(
        "--curriculum", type=float, default=0.15, help="share of the run that adds levels"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--eval_every", type=int, default=1000)
    parser.add_argument("--eval_problems", type=int, default=100)
    args = parser.parse_args(argv)
    recipe = RECIPES[args.size]
    args.steps, args.lr = args.steps or recipe.steps, args.lr or recipe.learning_rate
    torch.set_num_threads(args.threads)
    out = args.out or Path(f"checkpoints/abacus-{args.size}")
    args.run_dir.mkdir(parents=True, exist_ok=True)
    state = args.run_dir / f"{args.size}.safetensors"

    tokenizer = build_tokenizer()
    model = build_model(args.size, tokenizer, args.seed)
    decayed = [p for p in model.parameters() if p.ndim > 1]
    gains = [p for p in model.parameters() if p.ndim == 1]
    groups = [
        {"params": decayed, "weight_decay": 0.1},
        {"params": gains, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.98), fused=True)
    first = load_state(state, model, optimizer) if state.exists() else 0
    print(
        f"{args.size}: {model.num_parameters():,} parameters, step {first} of {args.steps}",
        flush=True,
    )

    started, tokens, losses = time.monotonic(), 0, []
    for step in range(first, args.steps):
        ids, weights = make_batch(step, args, tokenizer)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args)
        positions = torch.arange(ids.shape[1]).expand_as(ids)
        hidden = model.model(
            input_ids=ids, position_ids=positions, use_cache=False
        ).last_hidden_state
        wanted = weights[:, 1:] > 0
        weight = weights[:, 1:][wanted]
        logits = model.lm_head(hidden[:, :-1][wanted])
        token_losses = cross_entropy(logits, ids[:, 1:][wanted], reduction="none")
        loss = (token_losses * weight).sum() / weight.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        tokens += ids.numel()
        if (step + 1) % 100 == 0:
            rate = tokens / (time.monotonic() - started)
            print(
                f"step {step + 1} loss {sum(losses) / len(losses):.4f} {rate:,.0f} tok/s",
                flush=True,
            )
            losses.clear()
        if (step + 1) % args.eval_every == 0 or step + 1 == args.steps:
            save_state(state, step + 1, model, optimizer)
            report = accuracy(model, tokenizer, args.eval_problems)
            print(f"step {step + 1} accuracy {report}", flush=True)
    model.bfloat16().save_pretrained(out)
    tokenizer.save_pretrained(out)
    question = "Say hats 4.\\nSum cups: hats and 3.\\nHow many cups?"
    print(f"saved {out}; try: r2r-glimp generate $'{question}'")


if __name__ == "__main__":
    main()
