"""`equiv demo`: the whole story on the shipped model, in under a minute."""

import json

from rich.console import Console
from rich.text import Text

from equiv.checking import check
from equiv.demo.loading import (
    CARD,
    LORA,
    load_base,
    load_tokenizer,
    load_tuned,
    texts,
)
from equiv.report.answer import best, unsteered
from equiv.report.numbers import figure, percent
from equiv.report.report import Report
from equiv.report.text import WIDTH, rendered

SEQUENCES = 256


def run() -> Report:
    """Check the full fine-tune and the LoRA; print both; return the first's report."""
    console = Console(highlight=False, width=WIDTH)
    base, tokenizer = load_base(), load_tokenizer()
    lines = texts(SEQUENCES)
    console.print(_introduction(lines[0]))
    full = check(base, load_tuned(), lines, tokenizer=tokenizer, progress=True)
    console.print(rendered(full))
    console.print(Text("\nThe same skill learnt with LoRA of rank 8\n", style="bold"))
    lora = check(base, LORA, lines, tokenizer=tokenizer, progress=True)
    console.print(Text(lora.headline, style="bold"))
    console.print(_comparison(full, lora))
    return full


def _introduction(line: str) -> Text:
    accuracy = json.loads(CARD.read_text())["accuracy"]

    def share(model: str) -> str:
        return percent(accuracy[model]["new operators"]["all"]["accuracy"])

    return Text(
        "A Llama of 0.86 million parameters evaluates expressions such as\n\n"
        f"    {line}\n\n"
        "It knew MAX, MIN, MED and SM, and was fine-tuned on LAST and RNG: from "
        f"{share('base')} right answers\nto {share('tuned')} in all its weights, to "
        f"{share('lora')} with LoRA. How much of that can steering its activations "
        "do?\n"
    )


def _comparison(full: Report, lora: Report) -> Text:
    lines = []
    for name, report in (("full", full), ("LoRA", lora)):
        row, none = best(report), unsteered(report)
        if row is not None and none is not None:
            lines.append(
                f"  {name:<5} {percent(report.subject.update_relative_norm):>6} of the "
                f"weights' norm, KL {figure(none.distance)} → {figure(row.distance)}, "
                f"{percent(row.recovered)} recovered by {row.rung} at {row.site}"
            )
    return Text("\n".join(["", *lines, ""]))
