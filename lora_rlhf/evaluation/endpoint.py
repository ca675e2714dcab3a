"""A model behind an OpenAI-compatible endpoint as judge of pairs.

Each pair is asked twice with the answers' order swapped; where the two verdicts differ it is a tie.
Every reply is on disk before the next is counted, so that nothing paid for is asked again.
"""

import hashlib
import http.client
import json
import os
import re
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_rlhf.errors import UserError
from lora_rlhf.runs import Json

CACHE = "judge_replies.jsonl"
KEYS = ("LORA_RLHF_JUDGE_KEY", "OPENAI_API_KEY")
_OPENAI = "https://api.openai.com/v1"
_BUSY = (408, 409, 425, 429, 500, 502, 503, 504)
_LONGEST_WAIT = 60.0
_VERDICT = re.compile(r"\[\[([ABC])\]\]")

# The pairwise instructions of MT-bench (Zheng et al. 2023, arXiv:2306.05685; FastChat's
# judge_prompts.jsonl, pair-v2, Apache-2.0).
_SYSTEM = (
    "Please act as an impartial judge and evaluate the quality of the responses provided by two AI "
    "assistants to the user question displayed below. You should choose the assistant that follows "
    "the user's instructions and answers the user's question better. Your evaluation should "
    "consider factors such as the helpfulness, relevance, accuracy, depth, creativity, and level "
    "of detail of their responses. Begin your evaluation by comparing the two responses and "
    "provide a short explanation. Avoid any position biases and ensure that the order in which the "
    "responses were presented does not influence your decision. Do not allow the length of the "
    "responses to influence your evaluation. Do not favor certain names of the assistants. Be as "
    "objective as possible. After providing your explanation, output your final verdict by "
    'strictly following this format: "[[A]]" if assistant A is better, "[[B]]" if assistant B is '
    'better, and "[[C]]" for a tie.'
)
_PAIR = (
    "[User Question]\n{question}\n\n[The Start of Assistant A's Answer]\n{answer_a}\n"
    "[The End of Assistant A's Answer]\n\n[The Start of Assistant B's Answer]\n{answer_b}\n"
    "[The End of Assistant B's Answer]"
)


class JudgeError(UserError):
    """An endpoint that cannot be reached, or will not answer."""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """The key must not go to whomever a server points at."""

    def redirect_request(self, *_: Any) -> None:
        return None


_OPENER = urllib.request.build_opener(_NoRedirect)


@dataclass(frozen=True)
class Verdict:
    """What both orders say together.

    Attributes:
        value: 1 where the first answer wins both times, 0 where the second does, else 1/2.
        agreed: both orders gave the same verdict.
        unreadable: replies without a verdict, of the two; they count as ties.
    """

    value: float
    agreed: bool
    unreadable: int


class Endpoint:
    """Asks one model, several questions at a time.

    Args:
        model: its name at the server.
        url: up to and without /chat/completions; None: OPENAI_BASE_URL, else OpenAI's own.
        cache: a JSONL file of replies, by what was asked; made when it does not exist.
        timeout: seconds for one request.
        retries: further attempts where the server is busy or out of reach.
        workers: requests at once.
        first_wait: seconds before the second attempt; doubled each time, or what Retry-After says.
    """

    def __init__(
        self,
        model: str,
        url: str | None,
        cache: Path,
        timeout: float = 120.0,
        retries: int = 5,
        workers: int = 8,
        first_wait: float = 1.0,
    ) -> None:
        base = url or os.environ.get("OPENAI_BASE_URL") or _OPENAI
        self._model = model
        self._url = base.rstrip("/") + "/chat/completions"
        self._cache = cache
        self._timeout, self._retries = timeout, retries
        self._workers, self._first_wait = workers, first_wait
        self._lock = threading.Lock()
        self._replies = _read(cache)

    def judge(
        self,
        pairs: Sequence[tuple[str, str, str]],
        tell: Callable[[int], object] = lambda done: None,
    ) -> list[Verdict]:
        """Verdicts on (prompt, first answer, second answer), in order.

        Args:
            pairs: two equal answers tie without being asked about.
            tell: called with the number of pairs judged so far; what it raises ends the asking.

        Raises:
            JudgeError: the server refuses, or stays out of reach; the replies so far are kept.
        """
        found: dict[int, Verdict] = {
            i: Verdict(0.5, True, 0) for i, (_, a, b) in enumerate(pairs) if a == b
        }
        todo = [i for i in range(len(pairs)) if i not in found]
        with ThreadPoolExecutor(self._workers) as pool:
            futures = {pool.submit(self._verdict, *pairs[i]): i for i in todo}
            try:
                for future in as_completed(futures):
                    found[futures[future]] = future.result()
                    tell(len(found))
            except BaseException:
                # What is in flight is paid for: it is waited for and kept; the rest is not begun.
                pool.shutdown(wait=True, cancel_futures=True)
                raise
        return [found[i] for i in range(len(pairs))]

    def _verdict(self, prompt: str, first: str, second: str) -> Verdict:
        ahead = _preference(self._reply(prompt, first, second))
        behind = _preference(self._reply(prompt, second, first))
        unreadable = (ahead is None) + (behind is None)
        one = 0.5 if ahead is None else ahead
        other = 0.5 if behind is None else 1.0 - behind
        return Verdict(one if one == other else 0.5, one == other, unreadable)

    def _reply(self, prompt: str, first: str, second: str) -> str:
        question = _PAIR.format_map({"question": prompt, "answer_a": first, "answer_b": second})
        body = {
            "model": self._model,
            "messages": [
                {"role": "system", "content": _SYSTEM},
                {"role": "user", "content": question},
            ],
            "temperature": 0,
        }
        asked = json.dumps([self._url, body], sort_keys=True)
        key = hashlib.sha256(asked.encode()).hexdigest()
        with self._lock:
            if key in self._replies:
                return self._replies[key]
        reply, usage = self._ask(body)
        with self._lock:
            self._replies[key] = reply
            self._keep({"key": key, "model": self._model, "reply": reply, "usage": usage})
        return reply

    def _keep(self, record: Json) -> None:
        self._cache.parent.mkdir(parents=True, exist_ok=True)
        with self._cache.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())

    # -- http -----------------------------------------------------------------------------------

    def _ask(self, body: Json) -> tuple[str, Any]:
        """The text of the reply, and what it cost."""
        wait = self._first_wait
        for attempt in range(self._retries + 1):
            try:
                return _content(self._post(body), self._url)
            except urllib.error.HTTPError as error:
                if error.code not in _BUSY:
                    raise self._refused(error) from None
                problem = f"status {error.code}"
                wait = max(wait, _retry_after(error))
            except (OSError, http.client.HTTPException) as error:
                problem = str(getattr(error, "reason", error)) or type(error).__name__
            if attempt < self._retries:
                time.sleep(min(wait, _LONGEST_WAIT))
                wait *= 2
        raise JudgeError(
            f"judge: {self._url} did not answer in {self._retries + 1} attempts ({problem}). The "
            f"replies so far are kept in {self._cache}; give the same command again to go on."
        )

    def _post(self, body: Json) -> bytes:
        headers = {"Content-Type": "application/json"}
        key = next((os.environ[name] for name in KEYS if os.environ.get(name)), None)
        if key is not None:
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(self._url, json.dumps(body).encode(), headers)
        with _OPENER.open(request, timeout=self._timeout) as response:
            content: bytes = response.read()
        return content

    def _refused(self, error: urllib.error.HTTPError) -> JudgeError:
        said = error.read(400).decode("utf-8", "replace").strip()
        keys = " or ".join(KEYS)
        todo = {
            401: f"Set the environment variable {keys} to a valid key",
            403: f"Set the environment variable {keys} to a key that may use this model",
            404: "Check the model's name and the URL, which ends before /chat/completions",
        }.get(error.code, "Mend what it says")
        return JudgeError(
            f"judge: {self._url} refused model {self._model} with status {error.code}: {said} "
            f"{todo}; replies so far are kept in {self._cache}."
        )


def _preference(reply: str) -> float | None:
    """1 for A, 0 for B, 1/2 for a tie: the last verdict of a reply; None without one."""
    found = _VERDICT.findall(reply)
    return {"A": 1.0, "B": 0.0, "C": 0.5}[found[-1]] if found else None


def _content(answer: bytes, url: str) -> tuple[str, Any]:
    try:
        parsed = json.loads(answer)
        text = parsed["choices"][0]["message"]["content"]
    except (ValueError, KeyError, IndexError, TypeError) as error:
        start = answer[:200].decode("utf-8", "replace")
        raise JudgeError(
            f"judge: {url} does not answer as OpenAI's chat completions do ({error!r}): {start} "
            f"Check the URL, which ends before /chat/completions."
        ) from error
    return text or "", parsed.get("usage")


def _retry_after(error: urllib.error.HTTPError) -> float:
    """Seconds the server asks for; 0 where it names none, or a date."""
    try:
        return float(error.headers.get("Retry-After", 0))
    except ValueError:
        return 0.0


def _read(cache: Path) -> dict[str, str]:
    """Replies by key; a last line that a crash has cut is asked again."""
    if not cache.is_file():
        return {}
    content = cache.read_bytes()
    whole, _, cut = content.rpartition(b"\n")
    if cut:
        with cache.open("r+b") as file:
            file.truncate(len(content) - len(cut))
    records = [json.loads(line) for line in whole.split(b"\n") if line]
    return {record["key"]: record["reply"] for record in records}
