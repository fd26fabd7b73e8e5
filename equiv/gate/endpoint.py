"""A served model as one side of a comparison: an OpenAI-style completions endpoint.

A row of token ids t₀ … t₍ₙ₋₁₎ is one request, `POST {url}/completions`, that has the
server repeat the prompt (`echo`) and add one token. Of the n + 1 lists of likeliest
tokens in the answer, the first is null (nothing predicts t₀) and list p + 1 is the
distribution of the token after position p; the last comes from the added token. A
server that does not repeat prompts is asked once per position instead, with the row up
to there, and the added token's list is what is kept.

Nothing partial is returned: a row that fails fails the call.
"""

import json
import re
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from http.client import HTTPException, HTTPResponse
from typing import Any
from urllib.parse import urlsplit
from urllib.request import HTTPErrorProcessor, Request, build_opener

import torch
from torch import Tensor

from equiv.arguments import as_integer, as_number, shown
from equiv.errors import ArgumentError, EndpointError, InputsError
from equiv.gate.sides import TopK

# Characters of the server's answer that messages repeat.
EXCERPT = 200
# Seconds before the first retry, doubled before each further one.
PAUSE = 0.5
# Rounding may lift a log-probability this far above zero where the server computes the
# normaliser in half precision; what is higher is no log-probability.
ABOVE_ZERO = 1e-3
# Some servers write −∞ as the lowest float32.
_LOWEST = -1e300
_JSON = "application/json"
_TOKEN_ID = re.compile(r"token_id:([0-9]{1,9})")
# What usually causes a status, and what to do.
_ADVICE = {
    400: "Does the server take `logprobs` that large, and `echo`? Else lower `top` or "
    "pass `echo=False`.",
    401: "Pass `api_key=`.",
    403: "Check `api_key`.",
    404: "Check `url`, which usually ends in /v1, and `model`.",
}

Likeliest = list[tuple[int, float]]  # token id, log-probability; highest first


@dataclass(frozen=True)
class Completions:
    """Asks a server for the likeliest next tokens; a side of a comparison.

    Called with token ids, integer [batch, seq], it returns `TopK` of [batch, seq, k]:
    k is `top`, or less where a list of the server's is shorter than that.

    Attributes:
        url: What stands before /completions, such as "http://127.0.0.1:8000/v1".
        model: Name of the model on the server.
        tokenizer: The model's Hugging Face tokenizer, for servers that name tokens by
            their text instead of their ids (vLLM gives ids).
        top: Likeliest tokens per position; servers have a limit (vLLM: 20, raised by
            its option `--max-logprobs`).
        api_key: Sent as a bearer token; shown in no message.
        timeout: Seconds that the server may be silent.
        retries: Further attempts after a broken connection and status 429 or 5xx.
        echo: Whether the server can repeat the prompt. `False` for those that cannot,
            such as llama.cpp's: one request per position.

    Raises:
        ArgumentError: If an attribute is outside its set.
        InputsError: On the call, if the token ids are none.
        EndpointError: On the call, if any row is not answered as it should.

    Example:
        >>> Completions("http://127.0.0.1:8000/v1", "mine", api_key="secret")
        Completions(url='http://127.0.0.1:8000/v1', model='mine', top=20, \
timeout=60.0, retries=2, echo=True)
    """

    url: str
    model: str
    tokenizer: Any = field(default=None, repr=False)
    top: int = 20
    api_key: str | None = field(default=None, repr=False)
    timeout: float = 60.0
    retries: int = 2
    echo: bool = True

    def __post_init__(self) -> None:
        _check_texts(self)
        values: dict[str, object] = {
            "url": self.url.rstrip("/"),
            "top": as_integer("top", self.top, 1),
            "retries": as_integer("retries", self.retries, 0),
            "timeout": as_number(
                "timeout", self.timeout, "seconds in 0…1e6", lambda t: 0 < t <= 1e6
            ),
        }
        for name, value in values.items():  # of the one type that is sent and compared
            object.__setattr__(self, name, value)

    def __call__(self, ids: Tensor) -> TopK:
        """The likeliest next tokens after every position of every row."""
        rows = _rows(ids)
        found = []
        for n, row in enumerate(rows, 1):
            try:
                found.append(self._row(row))
            except EndpointError as error:
                raise EndpointError(
                    f"{self.url}, row {n} of {len(rows)}: {error}"
                ) from None
        k = min(len(likeliest) for row in found for likeliest in row)
        pairs = [[likeliest[:k] for likeliest in row] for row in found]
        both = torch.tensor(pairs, dtype=torch.float64, device=ids.device)
        return TopK(both[..., 0].long(), both[..., 1])

    def _row(self, row: list[int]) -> list[Likeliest]:
        if self.echo:
            after = self._lists(row, len(row) + 1)[1:]
        else:
            after = [self._lists(row[: p + 1], 1)[0] for p in range(len(row))]
        return [self._likeliest(found, p) for p, found in enumerate(after)]

    def _lists(self, prompt: list[int], count: int) -> list[Any]:
        """The lists of likeliest tokens in the server's answer: so many."""
        body = self._answer(prompt)
        try:
            found: Any = json.loads(body)["choices"][0]["logprobs"]
            if "top_logprobs" in found:
                lists = list(found["top_logprobs"])
            else:  # llama.cpp's, in the form of chats
                lists = [entry["top_logprobs"] for entry in found["content"]]
        except (ValueError, RecursionError):
            raise EndpointError(
                f"Expected JSON, got {self._excerpt(body)}. Is this the address of a "
                "completions endpoint?"
            ) from None
        except (LookupError, TypeError):
            raise EndpointError(
                "Expected `choices[0].logprobs.top_logprobs` in the answer, got "
                f"{self._excerpt(body)}. Does the server give log-probabilities?"
            ) from None
        if len(lists) != count:
            raise EndpointError(_miscounted(len(lists), count))
        return lists

    def _answer(self, prompt: list[int]) -> bytes:
        request = self._request(prompt)
        for attempt in range(self.retries + 1):
            if attempt:
                time.sleep(PAUSE * 2 ** (attempt - 1))
            status, body = self._sent(request)
            if status == 200:
                return body
            if 0 < status < 500 and status != 429:
                break
        tried = f" after {attempt + 1} attempts" if attempt else ""
        if not status:
            raise EndpointError(
                f"No connection{tried}: {self._excerpt(body)}. Is the server running?"
            )
        raise EndpointError(
            f"Expected status 200, got {status}{tried}: {self._excerpt(body)}. "
            + _ADVICE.get(status, "The server's log says more.")
        )

    def _request(self, prompt: list[int]) -> Request:
        settings = {
            "model": self.model,
            "prompt": prompt,
            "echo": self.echo,
            "max_tokens": 1,
            "logprobs": self.top,
            "temperature": 0,
            "return_tokens_as_token_ids": True,  # vLLM's; others ignore it
        }
        body, headers = json.dumps(settings).encode(), {"Content-Type": _JSON}
        if self.api_key is not None:
            headers["Authorization"] = f"Bearer {self.api_key}"
        return Request(f"{self.url}/completions", body, headers)

    def _sent(self, request: Request) -> tuple[int, bytes]:
        """Status and body of one attempt; without a connection 0, and why.

        Raises:
            EndpointError: If the time is over.
        """
        try:
            with build_opener(_AsItIs).open(request, timeout=self.timeout) as response:
                return response.status, response.read()
        except (OSError, HTTPException, UnicodeError) as error:
            reason = getattr(error, "reason", error)
            if isinstance(reason, TimeoutError):
                raise EndpointError(
                    f"No answer within {self.timeout:g} seconds. Pass a longer "
                    "`timeout`, or fewer and shorter rows."
                ) from None
            return 0, (str(reason) or type(reason).__name__).encode("utf-8", "replace")

    def _likeliest(self, found: Any, position: int) -> Likeliest:
        """Token ids and log-probabilities of one position, highest first."""
        made: dict[int, float] = {}
        for token, value in _pairs(found, position):
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not number or not _LOWEST <= value <= ABOVE_ZERO:
                raise EndpointError(
                    f"Expected a finite log-probability of {shown(token)} after "
                    f"position {position}, not above 0, got {shown(value)}."
                )
            if (named := self._id(token, position)) in made:
                raise EndpointError(
                    f"Two tokens after position {position} are both number {named} of "
                    "the vocabulary. Is this the model's own `tokenizer`?"
                )
            made[named] = float(value)
        ranked = sorted(made.items(), key=lambda pair: (-pair[1], pair[0]))
        return ranked[: self.top]

    def _id(self, token: object, position: int) -> int:
        """The id of a token, given as such, as "token_id:7" or by its text."""
        given = _TOKEN_ID.fullmatch(token) if isinstance(token, str) else None
        named = int(given[1]) if given else token
        if type(named) is int and 0 <= named < 10**9:
            return named
        ids = _ids_of(self.tokenizer, token)
        if len(ids) == 1:
            return ids.pop()
        why = "Pass the model's `tokenizer=`"
        if self.tokenizer is not None:
            count = len(ids) or "no"
            why = f"The tokenizer has {count} such tokens. Pass the model's own"
        raise EndpointError(
            f"Expected token ids after position {position}, got {shown(token)}. "
            f"{why}, or have the server give ids (vLLM: --return-tokens-as-token-ids)."
        )

    def _excerpt(self, body: bytes) -> str:
        """The beginning of an answer, for messages; a server may repeat the key."""
        text = body.decode("utf-8", "replace")
        text = text.replace(self.api_key, "…") if self.api_key else text
        return repr(text[:EXCERPT])


class _AsItIs(HTTPErrorProcessor):
    """Hands on every answer, whatever its status; a key follows no redirection."""

    def http_response(self, request: Request, response: HTTPResponse) -> HTTPResponse:
        return response

    https_response = http_response


def _check_texts(asked: Completions) -> None:
    """Check what is sent as text; messages show no address that may hold a secret."""
    url, key, tokenizer = asked.url, asked.api_key, asked.tokenizer
    if not isinstance(url, str) or not _is_address(url):
        raise ArgumentError(
            'Expected `url` as in "http://127.0.0.1:8000/v1", without user, query and '
            "spaces, got something else."
        )
    if not isinstance(asked.model, str) or not asked.model:
        raise ArgumentError(
            "Expected `model` to be the name of a model on the server, got "
            f"{shown(asked.model)}."
        )
    if key is not None and not (isinstance(key, str) and _is_visible(key)):
        raise ArgumentError(
            "Expected `api_key` in visible ASCII characters, got something else. Is "
            "there a space or a line break at its end?"
        )
    methods = ("encode", "convert_tokens_to_ids")
    if tokenizer is not None and not all(hasattr(tokenizer, m) for m in methods):
        raise ArgumentError(
            "Expected `tokenizer` to be the model's Hugging Face tokenizer, got "
            f"{shown(tokenizer)}."
        )


def _is_address(url: str) -> bool:
    try:
        parts = urlsplit(url)
        fine = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        return False
    return bool(fine) and _is_visible(url) and not set("@?#") & set(url)


def _is_visible(text: str) -> bool:
    return bool(text) and all("!" <= character <= "~" for character in text)


def _rows(ids: object) -> list[list[int]]:
    if isinstance(ids, Tensor) and ids.ndim == 2 and ids.numel():
        rows = ids.tolist()
        if all(type(token) is int and token >= 0 for row in rows for token in row):
            return rows
    got = f"{ids.dtype} {list(ids.shape)}" if isinstance(ids, Tensor) else shown(ids)
    raise InputsError(
        f"Expected token ids as integers >= 0, of shape [batch, seq], got {got}."
    )


def _miscounted(lists: int, expected: int) -> str:
    said = f"Expected {expected} lists of likeliest tokens, got {lists}: "
    if lists == 1:
        return f"{said}the server does not repeat the prompt. Pass `echo=False`."
    if expected == 1:
        return f"{said}the server repeats the prompt. Pass `echo=True`."
    return (
        f"{said}a different tokenisation. Does the server add or skip a token that "
        "begins a text?"
    )


def _pairs(found: Any, position: int) -> Iterable[tuple[Any, Any]]:
    """Token and log-probability, from a mapping or a list of entries."""
    if isinstance(found, Mapping) and found:
        return found.items()
    try:
        pairs = [
            (entry.get("id", entry.get("token")), entry["logprob"]) for entry in found
        ]
    except (AttributeError, KeyError, TypeError):
        pairs = []
    if not pairs:
        raise EndpointError(
            f"Expected the likeliest tokens after position {position}, got "
            f"{shown(found)}. Was the list cut, or `logprobs` switched off?"
        )
    return pairs


def _ids_of(tokenizer: Any, token: object) -> set[int]:
    """Ids that a text may stand for: the vocabulary's entry, and what it encodes to.

    Both, because servers differ in what they print; where the two disagree nobody can
    tell which is meant.
    """
    if tokenizer is None or not isinstance(token, str):
        return set()
    ids = {tokenizer.convert_tokens_to_ids(token)}
    encoded = tokenizer.encode(token, add_special_tokens=False)
    ids |= set(encoded) if len(encoded) == 1 else set()
    named = token == getattr(tokenizer, "unk_token", None)
    return ids - {None, None if named else getattr(tokenizer, "unk_token_id", None)}
