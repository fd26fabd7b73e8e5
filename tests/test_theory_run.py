"""Running claims: what a test gets, what becomes of what it returns, the files."""

from pathlib import Path
from typing import Any

import torch

import equiv
from equiv.testing.models import transformer
from equiv.theory import Verdict
from equiv.theory.registry import from_file

MINE = '''
import equiv
from equiv.theory import ClaimResult, Verdict


@equiv.theory.claim("{name}", formula="1 = 1", source="this project")
def mine({needs}):
    """Because."""
    {body}
'''


def claims_of(folder: Path, body: str, needs: str = "", name: str = "mine") -> Path:
    path = folder / "my_claims.py"
    path.write_text(MINE.format(name=name, needs=needs, body=body))
    return path


def model_and_updates() -> tuple[Any, list[equiv.Update]]:
    model = transformer("llama", dtype=torch.float32)
    return model, [equiv.Update.random(model, 0.001, seed=n) for n in (0, 1)]


def test_a_claim_gets_what_it_names(tmp_path: Path) -> None:
    body = """
    assert setting.model is model and setting.update is update and seed == 3
    assert sum(batch.tokens for batch in inputs) > 0 and setting.random
    assert set(site for _, site in shifts) == set(equiv.model.sites.FLOW)
    return ClaimResult(Verdict.HOLDS, norm.name, evidence={"n": len(shifts)})"""
    needs = "setting, model, update, inputs, seed, norm, shifts"
    (own,) = from_file(claims_of(tmp_path, body, needs))
    model, updates = model_and_updates()
    found = equiv.theory.run([own], model, updates, norm="fisher", seed=3)
    assert found["mine"].verdict is Verdict.HOLDS
    assert [*found["mine"].results] == [update.source for update in updates]
    assert found["mine"].says == "fisher"
    assert found["mine"].to_dict()["evidence"] == {
        update.source: {"n": 14} for update in updates
    }
