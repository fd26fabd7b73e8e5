"""Positions and rows on live models, against plain hooks on single sequences.

The witness steers one unpadded sequence at a time, without a cache, by a hook that adds
a vector at columns chosen by counting. Batches, padding, caches, chunks, beams and
repeated rows must not change what it says.

Tolerance: float64 models, whose norms and rotary tables Transformers computes in
float32, in another order of summation with padding: 1e-4 of logits of size 10.
"""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import equiv
from equiv import Affine, ArgumentError, LowRankMLP, SteeringSet, Vector
from equiv.steering.applying.positions import Positions, window
from equiv.testing.models import transformer

PROMPTS = ([3, 9, 4, 11, 5], [7, 8], [12, 13, 14, 3])
WIDTH = 5
NEW = 4
# Words → whether token i is chosen, in a prompt of n tokens.
WORDS: dict[str, Callable[[int, int], bool]] = {
    "all": lambda i, n: True,
    "prompt": lambda i, n: i < n,
    "generated": lambda i, n: i >= n,
    "last": lambda i, n: i == n - 1,
    "first 2": lambda i, n: i < min(2, n),
    "last 3": lambda i, n: n - 3 <= i < n,
    "first 1 + last 1": lambda i, n: i in (0, n - 1),
    "last + generated": lambda i, n: i >= n - 1,
    "first 9": lambda i, n: i < n,
}
GENERATE = {"do_sample": False, "max_new_tokens": NEW, "pad_token_id": 0}


def model_of(family: str = "llama") -> Any:
    model = transformer(family, seed=3)
    if family != "bert":
        model.generation_config.eos_token_id = None  # never stop early
    return model


def vector(seed: int = 0) -> Tensor:
    return 3 * torch.randn(16, generator=torch.Generator().manual_seed(seed)).double()


def padded(side: str) -> dict[str, Tensor]:
    """The prompts as one batch."""
    ids = torch.zeros(len(PROMPTS), WIDTH, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(PROMPTS):
        n = len(prompt)
        columns = slice(WIDTH - n, WIDTH) if side == "left" else slice(0, n)
        ids[row, columns], mask[row, columns] = torch.tensor(prompt), 1
    return {"input_ids": ids, "attention_mask": mask}


def witness(
    model: Any, ids: list[int], chosen: Callable[[int], bool], v: Tensor
) -> Tensor:
    """Logits [seq, vocabulary] of one sequence, block 0 steered by a plain hook."""
    blocks = {"gpt2": "transformer.h", "bert": "bert.encoder.layer"}
    path = blocks.get(model.config.model_type, "model.layers")
    mask = torch.tensor([chosen(i) for i in range(len(ids))])[:, None]

    def add(_module: object, _args: object, out: Any) -> Any:
        hidden = out[0] if isinstance(out, tuple) else out
        hidden = hidden + mask * v
        return (hidden, *out[1:]) if isinstance(out, tuple) else hidden

    handle = model.get_submodule(path)[0].register_forward_hook(add)
    try:
        call = {"use_cache": False} if model.config.model_type != "bert" else {}
        return model(input_ids=torch.tensor([ids]), **call).logits[0]
    finally:
        handle.remove()


def greedy(
    model: Any, prompt: list[int], rule: Callable[[int, int], bool], v: Tensor
) -> tuple[list[int], Tensor]:
    """Tokens and logits [new, vocabulary], every forward over the whole sequence."""
    ids, n, logits = list(prompt), len(prompt), []
    for _ in range(NEW):
        logits.append(witness(model, ids, lambda i: rule(i, n), v)[-1])
        ids.append(int(logits[-1].argmax()))
    return ids[n:], torch.stack(logits)


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("family", "side"),
    [
        *[(f, s) for f in ("llama", "gpt2", "olmo2") for s in ("left", "right")],
        ("bert", "right"),  # it numbers columns: padded left it is given other inputs
    ],
)
@torch.no_grad()
def test_words_count_the_tokens_of_each_sequence(family: str, side: str) -> None:
    """One forward: all of it is prompt; padding neither counts nor matters."""
    model, v, batch = model_of(family), vector(), padded(side)
    if family == "gpt2":
        batch["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp_min(0)
    for words, rule in WORDS.items():
        with equiv.steer(model, {(0, "block_out"): Vector(v)}, positions=words):
            logits = model(**batch).logits
        for row, prompt in enumerate(PROMPTS):
            n = len(prompt)
            own = logits[row][batch["attention_mask"][row].bool()]
            expected = witness(model, list(prompt), lambda i: rule(i, n), v)  # noqa: B023
            close(own, expected)


@pytest.mark.parametrize(
    ("family", "how"),
    [
        ("llama", {}),
        ("llama", {"use_cache": False}),
        ("llama", {"prefill_chunk_size": 2}),
        ("llama", {"cache_implementation": "static"}),
        ("llama", {"attention_mask": None}),  # then it is inferred from the padding
        ("gpt2", {}),
        ("gpt2", {"use_cache": False}),
        ("olmo2", {}),
    ],
    ids=str,
)
@torch.no_grad()
def test_generation_is_steered_as_the_whole_sequence_is(
    family: str, how: dict[str, Any]
) -> None:
    model, v, batch = model_of(family), vector(), padded("left")
    ask = {**GENERATE, "return_dict_in_generate": True, "output_logits": True}
    tried = list(WORDS) if not how else ["all", "last + generated", "first 2"]
    for words in tried:
        with equiv.steer(model, {(0, "block_out"): Vector(v)}, positions=words):
            found = model.generate(**{**batch, **ask, **how})
        logits = torch.stack(found.logits, 1)
        for row, prompt in enumerate(PROMPTS):
            tokens, expected = greedy(model, list(prompt), WORDS[words], v)
            close(logits[row], expected)
            assert found.sequences[row, WIDTH:].tolist() == tokens


@pytest.mark.parametrize("static", [False, True])
@torch.no_grad()
def test_a_loop_with_a_cache_is_steered_as_the_whole_sequence_is(static: bool) -> None:
    from transformers import StaticCache

    model, v, prompt = model_of(), vector(), list(PROMPTS[0])
    for words, rule in WORDS.items():
        tokens, expected = greedy(model, prompt, rule, v)
        found, given = [], torch.tensor([prompt])
        cache = StaticCache(config=model.config, max_cache_len=16) if static else None
        with equiv.steer(model, {(0, "block_out"): Vector(v)}, positions=words):
            for token in tokens:
                out = model(input_ids=given, past_key_values=cache, use_cache=True)
                cache, given = out.past_key_values, torch.tensor([[token]])
                found.append(out.logits[0, -1])
        close(torch.stack(found), expected)


@torch.no_grad()
def test_a_part_that_is_given_tokens_is_steered_by_position() -> None:
    """A model's backbone called by itself, as a reward or probing head does."""
    model, batch = model_of(), padded("left")
    with equiv.steer(model, {(0, "block_out"): Vector(vector())}, positions="last"):
        alone = model.model(**batch).last_hidden_state
        assert torch.equal(model.lm_head(alone), model(**batch).logits)


@torch.no_grad()
def test_a_mask_names_columns() -> None:
    """Of the prompt, and further: in one forward, in `generate`, in a loop."""
    model, v, batch = model_of(), vector(), padded("left")
    mask = torch.rand(3, WIDTH + 2, generator=torch.Generator().manual_seed(0)) < 0.5
    steering = {(0, "block_out"): Vector(v)}
    with equiv.steer(model, steering, positions=mask):
        logits = model(**batch).logits
        hows = ({}, {"use_cache": False}, {"prefill_chunk_size": 2})
        told = [model.generate(**batch, **GENERATE, **how) for how in hows]
    for row, prompt in enumerate(PROMPTS):
        own = [*mask[row, WIDTH - len(prompt) :].tolist(), *[False] * NEW]
        tokens, _ = greedy(model, list(prompt), lambda i, _n: own[i], v)  # noqa: B023
        assert all(out[row, WIDTH:].tolist() == tokens for out in told)
        expected = witness(model, list(prompt), lambda i: own[i], v)  # noqa: B023
        close(logits[row, -len(prompt) :], expected)
    cache = model(input_ids=batch["input_ids"], use_cache=True).past_key_values
    two = torch.tensor([[5, 6]] * 3)
    with equiv.steer(model, steering, positions=mask):
        after = model(input_ids=two, past_key_values=cache).logits
    ids, only = torch.cat([batch["input_ids"], two], 1), mask.clone()
    only[:, :WIDTH] = False
    with equiv.steer(model, steering, positions=only):
        close(after, model(input_ids=ids).logits[:, WIDTH:])


@pytest.mark.parametrize(
    "how",
    [
        {"num_beams": 3},
        {"num_beams": 2, "use_cache": False},
        {"num_beams": 3, "num_return_sequences": 2},
        {"do_sample": True, "top_k": 1, "num_return_sequences": 2},
    ],
    ids=str,
)
@pytest.mark.parametrize("positions", [None, "prompt", "last 2 + generated"])
@torch.no_grad()
def test_repeated_rows_keep_their_steer(how: dict, positions: str | None) -> None:
    model, batch, index = model_of(), padded("left"), [1, -1, 0]
    bank = mixed()
    with equiv.steer(model, bank, index=index, positions=positions):
        out = model.generate(**batch, **{**GENERATE, **how})
    repeats = len(out) // len(PROMPTS)
    for row, prompt in enumerate(PROMPTS):
        number = index[row]
        alone = (
            nullcontext()
            if number < 0
            else equiv.steer(model, bank[number], positions=positions)
        )
        with alone:
            ids = torch.tensor([prompt])
            expected = model.generate(ids, **{**GENERATE, **how})[:, len(prompt) :]
        own = out[row * repeats : (row + 1) * repeats, WIDTH:]
        assert torch.equal(own, expected)


@torch.no_grad()
def test_a_generation_that_goes_on_has_a_longer_prompt() -> None:
    """A second turn on the cache of the first: its prompt is all there was before."""
    from transformers import DynamicCache

    model, v = model_of(), vector()
    cache = DynamicCache(config=model.config)
    first = model.generate(
        torch.tensor([PROMPTS[0]]), past_key_values=cache, **GENERATE
    )
    turn = torch.cat([first, torch.tensor([[5, 6]])], 1)
    with equiv.steer(model, {(0, "block_out"): Vector(v)}, positions="last"):
        out = model.generate(turn, past_key_values=cache, **GENERATE)
    tokens, _ = greedy(model, turn[0].tolist(), WORDS["last"], v)
    assert out[0, turn.shape[1] :].tolist() == tokens


@torch.no_grad()
def test_guessed_tokens_are_steered_as_generated_ones() -> None:
    """Speculative decoding runs guesses ahead and takes the wrong ones back."""
    model, v, prompt = model_of(), vector(), [3, 9, 4, 3, 9, 4, 11, 3, 9]
    ids = torch.tensor([prompt])
    for words in ("generated", "last + generated", "first 2", "prompt"):
        with equiv.steer(model, {(0, "block_out"): Vector(v)}, positions=words):
            out = model.generate(ids, **GENERATE, prompt_lookup_num_tokens=3)
        tokens, _ = greedy(model, prompt, WORDS[words], v)
        assert out[0, len(prompt) :].tolist() == tokens


@torch.no_grad()
def test_embeddings_are_a_prompt_too() -> None:
    model, batch = model_of(), padded("left")
    embeddings = model.model.embed_tokens(batch["input_ids"])
    mask = batch["attention_mask"]
    for words in ("first 1", "last + generated"):
        with equiv.steer(model, {(0, "block_out"): Vector(vector())}, positions=words):
            expected = model(**batch).logits
            assert torch.equal(
                model(inputs_embeds=embeddings, attention_mask=mask).logits, expected
            )
            told = model.generate(**batch, **GENERATE)[:, WIDTH:]
            shown = model.generate(
                inputs_embeds=embeddings, attention_mask=mask, **GENERATE
            )
            assert torch.equal(shown[:, -NEW:], told)


def mixed() -> list[Any]:
    """A bank of several forms and ranks, at several layers and sites."""
    source = torch.Generator().manual_seed(4)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=source, dtype=torch.float64)

    return [
        {(0, "block_out"): Vector(3 * random(16)), (1, "mlp_in"): Vector(random(16))},
        {
            (1, "mlp_out"): Affine(random(2, 16), random(16, 2)),
            (0, "resid_mid->block_out"): LowRankMLP(random(3, 16), random(16, 3)),
        },
        {
            (0, "block_out"): Affine(random(4, 16), random(16, 4), random(16)),
            (0, "mlp_in->block_out"): Vector(random(16)),
            (0, "resid_mid"): Vector(random(16)),
        },
    ]


@pytest.mark.parametrize("family", ["llama", "olmo2", "bert"])
@torch.no_grad()
def test_each_row_gets_its_own_steer_whatever_its_neighbours_get(family: str) -> None:
    model, bank = model_of(family), mixed()
    ids = torch.randint(3, 30, (6, 7), generator=torch.Generator().manual_seed(1))
    plain = model(input_ids=ids).logits
    whole = []
    for member in bank:
        with equiv.steer(model, member):
            whole.append(model(input_ids=ids).logits)
    results = []
    for index in ([0, 1, 2, -1, 0, 1], [0, -1, -1, -1, 2, 1], [0, 2, 2, -1, -1, 1]):
        with equiv.steer(model, bank, index=torch.tensor(index)):
            found = model(input_ids=ids).logits
        for row, number in enumerate(index):
            expected = plain if number < 0 else whole[number]
            # Not steered: bit for bit. Steered: the same computation, the same bits.
            assert torch.equal(found[row], expected[row]), (index, row)
        results.append(found)
    assert all(torch.equal(r[[0, 3, 5]], results[0][[0, 3, 5]]) for r in results[1:2])
    assert not torch.allclose(whole[0], plain) and not torch.allclose(*whole[1:])


@torch.no_grad()
def test_each_member_of_a_bank_has_its_own_positions() -> None:
    model, batch = model_of(), padded("left")
    v = Vector(vector())
    sets = [SteeringSet({(0, "block_out"): v}, positions=w) for w in ("last", "prompt")]
    with equiv.steer(model, sets, index=[1, 0, -1]):
        found = model(**batch).logits
    for row, number in ((0, 1), (1, 0)):
        with equiv.steer(model, sets[number]):
            assert torch.equal(found[row], model(**batch).logits[row])
    assert torch.equal(found[2], model(**batch).logits[2])
    with equiv.steer(model, sets[0], positions="prompt"):  # said here, it goes first
        asked = model(**batch).logits
    with equiv.steer(model, sets[1]):
        assert torch.equal(asked, model(**batch).logits)


@torch.no_grad()
def test_tokens_that_are_not_steered_keep_their_bits() -> None:
    """At the site, −0 included, and wherever no steered token is attended to."""
    model, batch = model_of(), padded("left")
    seen: list[Tensor] = []
    with equiv.steer(model, {(0, "block_out"): Vector(vector())}, positions="last 2"):
        handle = model.model.layers[0].register_forward_hook(
            lambda _m, _a, out: seen.append(out)
        )
        logits = model(**batch).logits
        handle.remove()
    handle = model.model.layers[0].register_forward_hook(
        lambda _m, _a, out: seen.append(out)
    )
    plain = model(**batch).logits
    handle.remove()
    assert torch.equal(seen[0][:, :-2], seen[1][:, :-2])
    assert (seen[0][:, -2:] != seen[1][:, -2:]).any(-1).all()
    assert torch.equal(logits[:, :-2], plain[:, :-2])
    layer = torch.nn.Sequential(torch.nn.Identity())
    zeros = torch.full((2, 3), -0.0)
    with equiv.steer(layer, [{(0, "0"): Vector(torch.zeros(3))}], index=[-1, 0]):
        assert torch.signbit(layer(zeros)).tolist() == [[True] * 3, [False] * 3]


@given(st.data())
def test_words_mean_what_counting_says(data: st.DataObject) -> None:
    masks = st.lists(st.booleans(), min_size=5, max_size=5)
    rows = data.draw(st.lists(masks, min_size=1, max_size=3))
    words = data.draw(st.sampled_from(list(WORDS)))
    start = data.draw(st.integers(0, 7))
    length = data.draw(st.integers(1, 4))
    real = torch.tensor(rows)
    positions = Positions.parse(words)
    prompt = positions.of_prompt(real)
    found = window(prompt, positions.generated, start, length)
    on_device = window(prompt, positions.generated, torch.tensor(start), length)
    assert torch.equal(found, on_device)
    for row, mask in enumerate(rows):
        for column in range(start, start + length):
            if column >= 5:
                expected = WORDS[words](column, 5)
            else:
                number = sum(mask[:column])
                expected = mask[column] and WORDS[words](number, sum(mask))
            assert bool(found[row, column - start]) == expected


@pytest.mark.parametrize(
    "words", ["", "first", "first 0", "last -1", "middle", "all +", "first 2, last", 3]
)
def test_other_words_are_refused(words: object) -> None:
    with pytest.raises(ArgumentError, match="Expected `positions` in all, prompt"):
        Positions.parse(words)
