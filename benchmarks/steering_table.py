"""Which steering stands in for a fine-tune, and how well: site × form × rank.

    python -m benchmarks.steering_table demo [--json FILE]
    python -m benchmarks.steering_table encoder --data DIR [--json FILE]

Of the demo's Llama with its two fine-tunes (LoRA, all weights), or of MiniLM tuned on
BoolQ's questions as in `real_encoder.py`. For every site,
form and rank the steering is fitted layer by layer on the stream already steered below
(`equiv.fit_steering`), its strength is chosen on other texts (0, ¼, ½, ¾, 1), and what
it leaves is measured on a third part that neither has seen: of the last block's shift
(misfit), and of the distance to the tuned model (KL, or the squared difference of the
output where there are no logits), with a 95 % bootstrap interval over texts.
"""

import argparse
import copy
import json
import platform
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

import equiv
from equiv.behaviour.evaluating import Evaluation
from equiv.report.numbers import between, figure, percent

RANK = 8
SITES = (
    "attn_heads",
    "attn_out",
    "resid_mid",
    "mlp_in",
    "mlp_hidden",
    "mlp_out",
    "block_out",
    "resid_mid->block_out",
    "mlp_hidden->block_out",
)
# Form and rank; "full" is no limit on the rank.
FORMS = (
    ("vector", None),
    ("linear", RANK),
    ("affine", 1),
    ("affine", RANK),
    ("affine", None),
    ("loreft", RANK),
    ("mlp", RANK),
    ("heads", None),
)
SAME_WIDTH = ("loreft",)  # forms that write what they read
# Fitted by descent: in the encoder that takes from minutes to a quarter of an hour.
SLOW = ("mlp",)


@dataclass(frozen=True)
class Subject:
    """A model with a fine-tune, and three lists of texts that do not overlap."""

    name: str
    model: nn.Module
    update: equiv.Update | nn.Module | Path
    tokenizer: Any
    fitting: list[str]
    choosing: list[str]
    unseen: list[str]
    skips_slow: bool = False


def demo_subjects() -> Iterator[Subject]:
    """The shipped Llama with its LoRA and its full fine-tune."""
    from equiv.demo import loading

    model, tokenizer = loading.load_base(), loading.load_tokenizer()
    drawn = loading.texts(800)
    parts = drawn[:400], drawn[400:500], drawn[500:]
    for name, update in (("LoRA", loading.LORA), ("all weights", loading.load_tuned())):
        yield Subject(f"demo Llama, {name}", model, update, tokenizer, *parts)


def encoder_subject(data: Path, seed: int) -> Subject:
    """MiniLM, fine-tuned here as in `real_encoder.py`."""
    from benchmarks.real_encoder import fine_tune, load, questions

    model, tokenizer = load()
    tuned = copy.deepcopy(model)
    train, test = (questions(data / f"{name}.json") for name in ("train", "test"))
    fine_tune(tuned, tokenizer, train, seed)
    unseen = [text for text in test if text not in set(train)]
    parts = unseen[:512], unseen[512:640], unseen[640:896]
    return Subject("MiniLM, all weights", model, tuned, tokenizer, *parts, True)


def goes_together(subject: Subject, site: str, form: str) -> bool:
    """Whether a form is for a site, and can be fitted there in a minute."""
    if form == "heads":
        return site == "attn_heads"
    if form in SLOW and subject.skips_slow:
        return False
    return form not in SAME_WIDTH or "->" not in site


def rows(subject: Subject) -> Iterator[dict[str, Any]]:
    """One row per site, form and rank that go together."""
    for site in SITES:
        for form, rank in FORMS:
            if not goes_together(subject, site, form):
                continue
            started = time.process_time()
            steering = equiv.fit_steering(
                subject.model,
                subject.update,
                subject.fitting,
                site=site,
                form=form,
                rank=rank,
                tokenizer=subject.tokenizer,
            )
            best = equiv.calibrate(
                subject.model,
                subject.update,
                subject.choosing,
                steering,
                tokenizer=subject.tokenizer,
            )
            found = equiv.evaluate(
                subject.model,
                subject.update,
                subject.unseen,
                best,
                tokenizer=subject.tokenizer,
            )
            yield {
                "subject": subject.name,
                "site": site,
                "form": form,
                "rank": rank,
                "strength": best.about["strength"],
                "parameters": steering.num_parameters,
                "cpu_seconds": time.process_time() - started,
                **fields(found),
            }


def fields(found: Evaluation) -> dict[str, Any]:
    """The figures of one evaluation."""
    return {
        "measure": found.measure,
        "unsteered": found.unsteered,
        "steered": found.steered,
        "recovered": found.recovered,
        "interval": found.interval,
        "same_top": found.same_top,
        "misfit_last_block": found.misfits[-1][1],
        "update_parameters": found.update_parameters,
        "texts": found.sequences,
        "tokens": found.tokens,
    }


def shown(row: dict[str, Any]) -> str:
    """A row as Markdown."""
    rank = row["rank"] or ("full" if row["form"] == "affine" else "")
    low_high = between(*row["interval"]) if row["interval"] else "–"
    return (
        f"| {row['site']} | {row['form']} {rank} | {percent(row['misfit_last_block'])} "
        f"| {figure(row['steered'])} | {percent(row['recovered'])} ({low_high}) "
        f"| {figure(row['strength'])} | {row['parameters']:,} |"
    )


def write(path: Path, found: list[dict[str, Any]]) -> None:
    """The rows as JSON, with what they were measured on."""
    versions = {n: version(n) for n in ("equiv", "torch", "transformers", "scipy")}
    content = {"machine": platform.machine(), "versions": versions, "rows": found}
    path.write_text(json.dumps(content, indent=1))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Site × form × rank.")
    parser.add_argument("what", choices=["demo", "encoder"])
    parser.add_argument("--data", type=Path, help="BoolQ's train.json and test.json.")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.what == "encoder" and arguments.data is None:
        parser.error("the encoder needs --data")
    torch.set_num_threads(1)  # no timing here, and small products
    subjects = (
        demo_subjects()
        if arguments.what == "demo"
        else [encoder_subject(arguments.data, arguments.seed)]
    )
    found: list[dict[str, Any]] = []
    for subject in subjects:
        print(f"\n{subject.name}\n")
        print("| site | form | last block left | distance | recovered | strength | n |")
        print("|---|---|---|---|---|---|---|")
        for row in rows(subject):
            print(shown(row), flush=True)
            found.append(row)
    if arguments.json:
        write(arguments.json, found)


if __name__ == "__main__":
    main()
