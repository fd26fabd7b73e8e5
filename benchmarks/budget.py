"""What a budget of parameters buys: designed against the same steer in every layer.

    python -m benchmarks.budget [--json FILE]

On the demo's Llama and its two fine-tunes. Each budget is what one uniform steering
costs at block_out (a vector, or affine of rank 1, 2, 4 or 8 in every layer), so the
uniform one spends all of it; `equiv.design` spends as much or less. Both are fitted
layer by layer on the stream already steered (`target="block"`), and both are trained on
from there towards the tuned model's output (`target="behaviour"`). The strength is
chosen on other texts, 0 included, and what is left is measured on texts that nothing
has seen.
"""

import argparse
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

import equiv
from benchmarks.steering_table import Subject, demo_subjects, write
from equiv.report.numbers import between, figure, percent
from equiv.steering.fits.plan import Planned

SITES = ("block_out", "mlp_out", "mlp_hidden->block_out", "resid_mid->block_out")
UNIFORM = "block_out"
RANKS = (None, 1, 2, 4, 8)  # `None`: a vector
LAYERS = 4


def uniform(rank: int | None) -> tuple[Planned, ...]:
    """The same steer in every layer."""
    form = "vector" if rank is None else "affine"
    return tuple(Planned(layer, UNIFORM, form, rank) for layer in range(LAYERS))


def rows(subject: Subject) -> Iterator[dict[str, Any]]:
    """One row per budget, plan and target."""
    report = equiv.check(
        subject.model,
        subject.update,
        subject.fitting,
        sites=SITES,
        tokenizer=subject.tokenizer,
    )
    width = subject.model.get_input_embeddings().embedding_dim  # pyright: ignore
    for rank in RANKS:
        numbers = width if rank is None else 2 * rank * width + width
        budget = LAYERS * int(numbers)
        design = equiv.design(report, budget)
        plans = {"uniform": uniform(rank), "designed": design.plan}
        for name, plan in plans.items():
            for target in ("block", "behaviour"):
                started = time.process_time()
                found = recovered(subject, plan, target)
                yield {
                    "subject": subject.name,
                    "budget": budget,
                    "plan": name,
                    "steers": [f"{p.layer} {p.site} {p.form} {p.rank}" for p in plan],
                    "target": target,
                    "predicted": design.predicted if name == "designed" else None,
                    "cpu_seconds": time.process_time() - started,
                    **found,
                }


def recovered(subject: Subject, plan: Sequence[Planned], target: str) -> dict[str, Any]:
    """Fitted, its strength chosen, and what it leaves on unseen texts."""
    known = {"tokenizer": subject.tokenizer}
    asked = (subject.model, subject.update)
    steering: Any = {}
    if plan:
        steering = equiv.fit_steering(
            *asked, subject.fitting, plan=plan, target=target, **known
        )
    if steering:
        steering = equiv.calibrate(*asked, subject.choosing, steering, **known)
    found = equiv.evaluate(*asked, subject.unseen, steering, **known)
    return {
        "measure": found.measure,
        "unsteered": found.unsteered,
        "steered": found.steered,
        "recovered": found.recovered,
        "interval": found.interval,
        "parameters": found.num_parameters,
        "update_parameters": found.update_parameters,
        "texts": found.sequences,
        "tokens": found.tokens,
    }


def shown(row: dict[str, Any]) -> str:
    """A row as Markdown."""
    low_high = between(*row["interval"]) if row["interval"] else "–"
    cells = (
        f"{row['budget']:,}",
        row["plan"],
        row["target"],
        f"{row['parameters']:,}",
        figure(row["steered"]),
        f"{percent(row['recovered'])} ({low_high})",
        "; ".join(row["steers"]),
    )
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Designed against uniform.")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # no timing here, and small products
    found: list[dict[str, Any]] = []
    for subject in demo_subjects():
        print(f"\n{subject.name}\n")
        print("| budget | plan | target | spent | distance | recovered | steers |")
        print("|---|---|---|---|---|---|---|")
        for row in rows(subject):
            print(shown(row), flush=True)
            found.append(row)
    if arguments.json:
        write(arguments.json, found)


if __name__ == "__main__":
    main()
