"""A served model answers as the model does; every failure is told for what it is."""

import json
import math
import socket
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from served import Answer, Seen, answer, as_id, likeliest, serving
from torch import Tensor

from equiv.errors import ArgumentError, EndpointError, InputsError
from equiv.gate import endpoint
from equiv.gate.endpoint import Completions
from equiv.gate.sides import TopK
from equiv.testing.models import transformer

IDS = torch.tensor([[3, 9, 4, 8], [5, 6, 7, 11], [1, 1, 30, 2]])
KEY = "sk-not-for-messages"
TOP = 5
MODEL = transformer("llama")


def log_probs(ids: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.log_softmax(MODEL(input_ids=ids).logits, -1)


def expected(ids: Tensor = IDS, k: int = TOP) -> tuple[Tensor, Tensor]:
    found = log_probs(ids).topk(k)
    return found.indices, found.values


def lists(
    body: dict[str, Any], name: Callable[[int], str] = as_id, own: bool = True
) -> list[Any]:
    """What a server that repeats the prompt says of it: null, then a list per token."""
    return likeliest(body, log_probs, name, own)


def right(body: dict[str, Any], _: int) -> Answer:
    return answer(lists(body))


def asked(seen: Seen, **settings: Any) -> Completions:
    usual = {"url": seen.url, "model": "tiny", "top": TOP, "retries": 0}
    return Completions(**{**usual, **settings})


def check(found: TopK, ids: Tensor = IDS, k: int = TOP) -> None:
    tokens, values = expected(ids, k)
    assert torch.equal(found.ids, tokens)
    torch.testing.assert_close(found.log_probs, values, rtol=0, atol=1e-6)


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint, "PAUSE", 0.0)


class Words:
    """A tokenizer: token 7 is "w7" in the vocabulary, and " w7" in a text."""

    unk_token, unk_token_id = "<unk>", 0

    def convert_tokens_to_ids(self, token: str) -> int:
        word = token.startswith("w") and " " not in token
        return int(token[1:]) if word else 0

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        assert not add_special_tokens
        parts = text.split(" ")[1:]
        return [int(part[1:]) if part.startswith("w") else 0 for part in parts]


def test_the_model_itself() -> None:
    with serving(right) as seen:
        found = asked(seen, api_key=KEY)(IDS)
    check(found)
    assert found.log_probs.dtype == torch.float64
    assert [body["prompt"] for body in seen.bodies] == IDS.tolist()
    assert seen.keys == [f"Bearer {KEY}"] * 3
    assert seen.paths == ["/v1/completions"] * 3
    sent = {k: v for k, v in seen.bodies[0].items() if k != "prompt"}
    assert sent == {
        "model": "tiny",
        "echo": True,
        "max_tokens": 1,
        "logprobs": TOP,
        "temperature": 0,
        "return_tokens_as_token_ids": True,
    }


def test_without_a_key_none_is_sent() -> None:
    with serving(right) as seen:
        check(asked(seen, url=seen.url + "/")(IDS[:1].int()), IDS[:1])
    assert seen.keys == [None]
    assert seen.paths == ["/v1/completions"]


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("name", ["w{}", " w{}"])
def test_tokens_by_their_text(own: bool, name: str) -> None:
    def by_text(body: dict[str, Any], _: int) -> Answer:
        return answer(lists(body, name.format, own))

    with serving(by_text) as seen:
        check(asked(seen, tokenizer=Words())(IDS))


def test_a_real_tokenizer() -> None:
    from equiv.demo.loading import load_tokenizer

    tokenizer = load_tokenizer()
    size = len(tokenizer)
    words = tokenizer.convert_ids_to_tokens(list(range(size)))
    for i, word in enumerate(words):
        assert endpoint._ids_of(tokenizer, word) == {i}
    assert endpoint._ids_of(tokenizer, "no such token") == set()


def test_a_server_that_does_not_repeat_prompts() -> None:
    """llama.cpp's refuses `echo`, and answers in the form of chats."""

    def last(body: dict[str, Any], _: int) -> Answer:
        if body["echo"]:
            return 400, b'{"error": "Only no echo is supported"}'
        row = log_probs(torch.tensor([body["prompt"]]))[0, -1]
        found = [
            {"id": i, "token": "?", "logprob": float(row[i])}
            for i in row.topk(body["logprobs"]).indices.tolist()
        ]
        content = [{"id": 0, "token": "?", "logprob": -1.0, "top_logprobs": found}]
        made = {"choices": [{"logprobs": {"content": content}}]}
        return 200, json.dumps(made).encode()

    with serving(last) as seen:
        check(asked(seen, echo=False)(IDS))
        assert len(seen.bodies) == IDS.numel()
        with pytest.raises(EndpointError, match=r"got 400.*no echo.*`echo=False`"):
            asked(seen)(IDS)


@pytest.mark.parametrize(
    ("echo", "said", "says"),
    [
        (True, [None], "got 1: the server does not repeat.*`echo=False`"),
        (False, [None, {}, {}], "got 3: the server repeats.*`echo=True`"),
        (True, [None] * 4, "Expected 5 lists .*got 4: a different tokenisation"),
        (True, [None] * 6, "Expected 5 lists .*got 6: a different tokenisation"),
        (True, [], "got 0: a different tokenisation"),
    ],
)
def test_another_count_of_tokens(echo: bool, said: list[Any], says: str) -> None:
    with (
        serving(lambda *_: answer(said)) as seen,
        pytest.raises(EndpointError, match=says),
    ):
        asked(seen, echo=echo)(IDS)


def test_lists_of_different_lengths_are_cut_to_the_shortest() -> None:
    def shorter(body: dict[str, Any], n: int) -> Answer:
        found = lists(body, own=False)
        if n == 1:
            found[2] = dict(list(found[2].items())[:3])
        return answer(found)

    with serving(shorter) as seen:
        check(asked(seen)(IDS), k=3)


def test_a_server_with_a_lower_limit() -> None:
    with serving(
        lambda body, _: answer(lists({**body, "logprobs": 2}, own=False))
    ) as s:
        check(asked(s)(IDS), k=2)


@pytest.mark.parametrize("nothing", [{}, [], None, "five", 3, [[]], [{"id": 3}]])
def test_a_position_without_tokens(nothing: object) -> None:
    def cut(body: dict[str, Any], _: int) -> Answer:
        return answer([*lists(body)[:2], nothing, *lists(body)[3:]])

    with (
        serving(cut) as seen,
        pytest.raises(EndpointError, match="tokens after position 1, got"),
    ):
        asked(seen)(IDS)


@pytest.mark.parametrize(
    "value",
    [math.nan, math.inf, -math.inf, 0.5, "-1.0", None, True, -(10**400), [-1.0]],
)
def test_values_that_are_no_log_probabilities(value: object) -> None:
    def wrong(body: dict[str, Any], n: int) -> Answer:
        found = lists(body)
        found[3]["token_id:4"] = value if n == 1 else -9.0
        return answer(found)

    with (
        serving(wrong) as seen,
        pytest.raises(EndpointError, match=r"row 2 of 3: .*finite.* position 2, not"),
    ):
        asked(seen)(IDS)


@pytest.mark.parametrize(
    ("status", "says"),
    [
        (400, "lower `top`"),
        (401, "Pass `api_key=`"),
        (403, "Check `api_key`"),
        (404, "`model`"),
        (302, "log"),
        (204, "log"),
        (500, "log"),
        (429, "log"),
    ],
)
def test_every_other_status(status: int, says: str) -> None:
    body = b"" if status == 204 else b"No. " + b"x" * 300
    with (
        serving(lambda *_: (status, body)) as seen,
        pytest.raises(EndpointError, match=f"status 200, got {status}: .*{says}") as e,
    ):
        asked(seen)(IDS)
    assert len(seen.bodies) == 1
    said = str(e.value)
    assert f"{seen.url}, row 1 of 3: " in said
    assert said.count("x") < 200 and (status == 204 or "No. xxx" in said)


@pytest.mark.parametrize("bad", [0, 429, 500, 503])
def test_passing_trouble_is_tried_again(bad: int) -> None:
    def third(body: dict[str, Any], n: int) -> Answer:
        return right(body, n) if n in (2, 3, 5) else (bad, b"busy")

    with serving(third) as seen:
        check(asked(seen, retries=2)(IDS))
        assert len(seen.bodies) == 6


@pytest.mark.parametrize(
    ("bad", "says"), [(0, "No connection after 3 at"), (503, "got 503 after 3 at")]
)
def test_lasting_trouble_in_the_middle_of_a_batch(bad: int, says: str) -> None:
    with (
        serving(lambda body, n: right(body, n) if not n else (bad, b"busy")) as seen,
        pytest.raises(EndpointError, match=f"row 2 of 3: .*{says}"),
    ):
        asked(seen, retries=2)(IDS)
    assert len(seen.bodies) == 4


def test_wrong_requests_are_not_tried_again() -> None:
    with (
        serving(lambda *_: (404, b"no such model")) as seen,
        pytest.raises(EndpointError, match="no such model"),
    ):
        asked(seen, retries=5)(IDS)
    assert len(seen.bodies) == 1


@pytest.mark.parametrize(
    "content",
    [b"", b"<html>hello</html>", b"\xff\xfe", b'{"choices": [', b"[" * 100_000],
)
def test_no_json(content: bytes) -> None:
    with (
        serving(lambda *_: (200, content)) as seen,
        pytest.raises(EndpointError, match="Expected JSON, got ") as error,
    ):
        asked(seen)(IDS)
    assert len(str(error.value)) < 400


@pytest.mark.parametrize(
    "found",
    [
        [],
        {},
        None,
        {"error": {"message": "overloaded"}},
        {"choices": []},
        {"choices": {}},
        {"choices": [{"text": "a"}]},
        {"choices": [{"logprobs": None}]},
        {"choices": [{"logprobs": {"tokens": ["a"]}}]},
        {"choices": [{"logprobs": {"top_logprobs": None}}]},
        {"choices": [{"logprobs": {"content": [{"token": "a"}]}}]},
        {"choices": [{"logprobs": "top_logprobs"}]},
    ],
)
def test_json_without_the_fields(found: object) -> None:
    with (
        serving(lambda *_: (200, json.dumps(found).encode())) as seen,
        pytest.raises(
            EndpointError, match=r"logprobs.top_logprobs` in the answer, got"
        ),
    ):
        asked(seen)(IDS)


@pytest.mark.parametrize(
    ("token", "tokenizer", "says"),
    [
        ("hello", None, "got 'hello'. Pass the model's `tokenizer=`, or have"),
        ("hello", Words(), "The tokenizer has no such tokens. Pass the model's own"),
        (" w3 w4", Words(), "got ' w3 w4'"),
        ("token_id:", None, "got 'token_id:'"),
        ("token_id:-1", None, "got 'token_id:-1'"),
        ("token_id:" + "9" * 30, None, "got 'token_id:"),
        (" w6", Words(), "both number 6 of the vocabulary"),
    ],
)
def test_tokens_that_cannot_be_told(token: str, tokenizer: Any, says: str) -> None:
    def odd(body: dict[str, Any], n: int) -> Answer:
        found = lists(body)
        found[1] |= {as_id(6): -7.0, token: -8.0}
        return answer(found) if n else answer(lists(body))

    with (
        serving(odd) as seen,
        pytest.raises(EndpointError, match=f"row 2 of 3: .*{says}"),
    ):
        asked(seen, tokenizer=tokenizer)(IDS)


def test_a_text_that_names_two_tokens() -> None:
    class Two(Words):
        def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
            return [1]

    with (
        serving(lambda body, _: answer(lists(body, "w{}".format))) as seen,
        pytest.raises(EndpointError, match="The tokenizer has 2 such tokens"),
    ):
        asked(seen, tokenizer=Two())(IDS)


def test_nobody_listens() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    with pytest.raises(
        EndpointError, match=r"No connection after 3 attempts: .*refused"
    ):
        Completions(url, "tiny")(IDS)


@pytest.mark.parametrize("host", ["nobody.invalid", "a..b", "x" * 80])
def test_no_such_host(host: str) -> None:
    with pytest.raises(EndpointError, match=r"No connection: .*Is the server"):
        Completions(f"http://{host}/v1", "tiny", retries=0)(IDS)


def test_a_server_that_takes_too_long() -> None:
    done = threading.Event()

    def slow(body: dict[str, Any], n: int) -> Answer:
        if n:
            done.wait(10)
        return right(body, n)

    with serving(slow) as seen:
        with pytest.raises(EndpointError, match=r"row 2 of 3: No answer within 0\.5 s"):
            asked(seen, timeout=0.5, retries=3)(IDS)
        assert len(seen.bodies) == 2  # a slow server is not asked again
        done.set()


@pytest.mark.parametrize("status", [200, 302, 401, 500])
def test_the_key_is_in_no_message(status: int) -> None:
    def telling(body: dict[str, Any], _: int) -> Answer:
        return status, b"x" * 190 + f"Wrong key {KEY}".encode() * 9

    with serving(telling) as seen:
        made = asked(seen, api_key=KEY)
        assert KEY not in repr(made)
        with pytest.raises(EndpointError) as error:
            made(IDS)
    assert KEY not in str(error.value) and KEY[:5] not in str(error.value)
    assert seen.paths == ["/v1/completions"]  # no redirection is followed


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"url": "127.0.0.1:8000/v1"}, "`url`"),
        ({"url": "ftp://127.0.0.1/v1"}, "`url`"),
        ({"url": f"http://user:{KEY}@host/v1"}, "`url`"),
        ({"url": f"http://host/v1?key={KEY}"}, "`url`"),
        ({"url": "http://host:port/v1"}, "`url`"),
        ({"url": "http://host:99999/v1"}, "`url`"),
        ({"url": "http:///v1"}, "`url`"),
        ({"url": "http://[::1/v1"}, "`url`"),
        ({"url": "http://host/v 1"}, "`url`"),
        ({"url": None}, "`url`"),
        ({"model": ""}, "`model`"),
        ({"model": MODEL}, "`model`"),
        ({"top": 0}, "`top`"),
        ({"top": 2.5}, "`top`"),
        ({"retries": -1}, "`retries`"),
        ({"timeout": 0}, "`timeout`"),
        ({"timeout": math.inf}, "`timeout`"),
        ({"timeout": "60"}, "`timeout`"),
        ({"api_key": f"{KEY}\n"}, "`api_key`"),
        ({"api_key": f"{KEY} ü"}, "`api_key`"),
        ({"api_key": 3}, "`api_key`"),
        ({"tokenizer": "a path"}, "`tokenizer`"),
    ],
)
def test_wrong_settings(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ArgumentError, match=says) as error:
        Completions(**{"url": "http://127.0.0.1/v1", "model": "tiny", **settings})
    assert KEY not in str(error.value)


@pytest.mark.parametrize(
    "ids",
    [
        IDS[0],
        IDS.double(),
        IDS.bool(),
        IDS - 5,
        IDS[:, :0],
        IDS[:0],
        IDS.tolist(),
        "text",
    ],
)
def test_what_is_no_rows_of_token_ids(ids: Any) -> None:
    with pytest.raises(InputsError, match=r"\[batch, seq\], got"):
        Completions("http://127.0.0.1:9/v1", "tiny")(ids)


def test_settings_of_other_types_are_sent_as_numbers() -> None:
    with serving(right) as seen:
        check(asked(seen, top=torch.tensor(3), timeout=torch.tensor(9))(IDS), k=3)
    assert seen.bodies[0]["logprobs"] == 3
