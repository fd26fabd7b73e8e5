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
from equiv.report.answer import best, exact_oracle, unsteered
from equiv.report.grid import Grid
from equiv.report.numbers import figure, percent
from equiv.report.prose import Prose
from equiv.report.report import Report
from equiv.report.text import WIDTH, rendered

SEQUENCES = 160


def run() -> Report:
    """Check the LoRA and the full fine-tune; print both; return the first's report."""
    console = Console(highlight=False)
    console.width = min(WIDTH, console.width)
    base, tokenizer = load_base(), load_tokenizer()
    lines = texts(SEQUENCES)
    console.print(_introduction(lines[0]))
    lora = check(base, LORA, lines, tokenizer=tokenizer, progress=True)
    console.print(rendered(lora))
    console.print(Text("\nThe same skill learnt in all weights\n", style="bold"))
    full = check(base, load_tuned(), lines, tokenizer=tokenizer, progress=True)
    console.print(Prose(full.headline, style="bold"))
    console.print("")
    console.print(_comparison({"LoRA": lora, "all weights": full}))
    console.print(
        Prose(
            "\nThe exact oracle sets the site to the tuned model's own activation in "
            "every layer: what it leaves is out of reach of any steer there. What it "
            "leaves at block_out is done by the update of the output head.\n"
            "`--html FILE` writes the first report as a page with its pictures.\n"
        )
    )
    return lora


def _introduction(line: str) -> Prose:
    accuracy = json.loads(CARD.read_text())["accuracy"]

    def share(model: str) -> str:
        return percent(accuracy[model]["new operators"]["all"]["accuracy"])

    return Prose(
        "A Llama of 0.86 million parameters evaluates expressions such as\n\n"
        f"    {line}\n\n"
        "It learnt MAX, MIN, MED and SM, and rarely met LAST and RNG. Fine-tuning "
        "takes its right answers on these two from "
        f"{share('base')} to {share('lora')} (LoRA of rank 8) or {share('tuned')} (all "
        "weights). How much of that can steering its activations do?\n"
    )


def _comparison(reports: dict[str, Report]) -> Grid:
    header = ("update", "size", "KL", "steered", "recovered", "by", "oracle")
    rows = []
    for name, report in reports.items():
        row, none, oracle = best(report), unsteered(report), exact_oracle(report)
        assert row is not None and none is not None and oracle is not None
        rows.append(
            (
                name,
                percent(report.subject.update_relative_norm),
                figure(none.distance),
                figure(row.distance),
                percent(row.recovered),
                f"{row.rung} at {row.site}",
                percent(oracle.recovered),
            )
        )
    return Grid("Both updates", header, rows)
