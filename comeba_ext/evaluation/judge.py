"""A language model's verdict on written answers, from an endpoint that the user names; never asked by default.

Whether "She was born in the Polish capital" answers "Warsaw" is no matter of strings. An endpoint of OpenAI's form
(``POST <url>/chat/completions``: OpenAI's own, vLLM, llama.cpp, Ollama …) is shown the question, the right answers and what was written,
and asked for one word, as Yang et al. do (arXiv 2502.11177, section 3). Verdicts can be kept in a file, which is asked first.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import logging
import os
import re
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from comeba_ext.errors import ComebaError
from comeba_ext.evaluation.written import normalised
from comeba_ext.storage import writable, write_text

log = logging.getLogger(__name__)

INSTRUCTION = (
    "You grade short answers. You are given a question or the beginning of a statement, the correct answers, and an answer. The answer is "
    "CORRECT if it says what one of the correct answers says, in whatever words, and does not contradict it. It is INCORRECT otherwise, "
    "also if it does not commit itself. The correct answers count as true even where you know otherwise. Reply with one word."
)
_BEGINS = '{"of": "'  # a line of kept verdicts
# The first word, whatever marks it ("**CORRECT**"); "correct-ish" is another word.
_VERDICT = re.compile(r"[\W_]*(in)?correct(?![^\W_]|-\w)", re.IGNORECASE)
_CORRECT, _INCORRECT = re.compile(r"\bcorrect\b", re.IGNORECASE), re.compile(r"\bincorrect\b", re.IGNORECASE)
# What takes back that an answer is correct, or a part of it. An INCORRECT needs no such list: "not" explains it.
_DOUBT = re.compile(
    r"\b(not|no|none|nor|never|cannot|but|however|although|though|except|only|if|unless|partial|partially|partly|almost|nearly|mostly|somewhat"
    r"|wrong|false)\b|n['’]t\b",
    re.IGNORECASE,
)


class Answer(NamedTuple):
    """What is judged: a prompt, its right answers, and what was written."""

    prompt: str
    right: tuple[str, ...]
    written: str


@dataclass
class Judge:
    """Asks an endpoint.

    Args:
        url: its base, e.g. ``http://localhost:8000/v1``.
        model: which of its models.
        key: sent as a bearer token; ``None``: none. It is not kept anywhere.
        timeout: seconds for a reply.
        tries: how often an answer is asked about before its verdict is ``None``.
        parallel: how many are asked about at a time.
        kept: JSON lines of verdicts to ask first, and to add to.

    Attributes:
        asked: how many verdicts the endpoint gave; nothing: how many it failed to give.

    Raises:
        ComebaError: the file of verdicts holds something else (but for a last line that is torn, which is dropped), or cannot be
            written.
    """

    url: str
    model: str
    key: str | None = field(default=None, repr=False)
    timeout: float = 60.0
    tries: int = 3
    parallel: int = 4
    kept: Path | None = None
    asked: int = field(default=0, init=False)
    nothing: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            raise ComebaError(f"the judge's URL must begin with http:// or https://, got {self.url!r}")
        self._known: dict[str, bool] = {}
        if self.kept is not None:
            self.kept = writable(self.kept)  # known before the long work
            if self.kept.exists():
                self._known = self._read(self.kept)

    def _read(self, kept: Path) -> dict[str, bool]:
        try:
            kept.open("ab").close()
        except OSError as error:
            raise self._unwritten(error) from None
        try:
            lines = kept.read_text(encoding="utf-8").splitlines(keepends=True)
            if lines and not lines[-1].endswith("\n"):
                lines[-1:] = _whole(lines[-1])
                write_text(kept, "".join(lines))  # the next one begins a line
            return {line["of"]: bool(line["verdict"]) for line in map(json.loads, lines)}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ComebaError(f"{kept}: not a file of verdicts ({error})") from None

    def verdicts(self, answers: Sequence[Answer], bar=None) -> dict[Answer, bool | None]:
        """Whether each answer is right; ``None`` where the judge gave no verdict. One that is a right answer word for word is not asked
        about.

        Raises:
            ComebaError: the endpoint cannot be reached, drops every connection or refuses, or the file of verdicts cannot be written; what
                had been said by then is :meth:`known`.
        """
        found: dict[Answer, bool | None] = {**self.known(answers)}
        todo = [answer for answer in dict.fromkeys(answers) if answer not in found]
        if bar is not None:
            bar.update(len(found))
        with ThreadPoolExecutor(self.parallel) as pool:
            waiting = [pool.submit(self._ask, answer) for answer in todo]
            try:
                for answer, one in zip(todo, waiting, strict=True):
                    found[answer] = verdict = one.result()
                    if verdict is None:
                        self.nothing += 1
                    else:
                        self.asked += 1
                        self._keep(answer, verdict)
                    if bar is not None:
                        bar.update(1)
            except BaseException:
                for one in waiting:
                    one.cancel()
                raise
        return found

    def known(self, answers: Sequence[Answer]) -> dict[Answer, bool]:
        """The verdicts that need no asking."""
        found = {}
        for answer in dict.fromkeys(answers):
            written = normalised(answer.written)
            if written and written in map(normalised, answer.right):  # nothing equals nothing, but answers no question
                found[answer] = True
            elif (known := self._known.get(self._name(answer))) is not None:
                found[answer] = known
        return found

    def _name(self, answer: Answer) -> str:
        return hashlib.sha256(json.dumps([self.model, INSTRUCTION, *answer]).encode()).hexdigest()

    def _keep(self, answer: Answer, verdict: bool) -> None:
        self._known[self._name(answer)] = verdict
        if self.kept is None:
            return
        line = json.dumps({"of": self._name(answer), "verdict": verdict, **answer._asdict()}) + "\n"
        size = None
        try:
            with self.kept.open("ab") as file:
                size = file.tell()
                file.write(line.encode())
        except OSError as error:
            if size is not None:
                with suppress(OSError):
                    os.truncate(self.kept, size)  # no torn line, which another would be written behind
            raise self._unwritten(error) from None

    def _unwritten(self, error: OSError) -> ComebaError:
        return ComebaError(f"{self.kept}: verdicts cannot be kept there ({error.strerror or error}); choose another file")

    def _ask(self, answer: Answer) -> bool | None:
        right = "; ".join(answer.right)
        text = f"Question or statement: {answer.prompt}\nCorrect answers: {right}\nAnswer: {answer.written or '(nothing)'}"
        messages = [{"role": "system", "content": INSTRUCTION}, {"role": "user", "content": text}]
        body = {"model": self.model, "messages": messages, "temperature": 0, "max_tokens": 8}
        dropped = 0
        for _ in range(self.tries):
            try:
                reply = self._post(body)["choices"][0]["message"]["content"]
            except ComebaError:
                raise
            except (TimeoutError, KeyError, IndexError, TypeError, ValueError) as error:
                log.info("judge: no verdict (%s: %s)", type(error).__name__, error)
                continue
            except (http.client.HTTPException, OSError) as error:  # it was reached, and hung up
                log.info("judge: no verdict (%s: %s)", type(error).__name__, error)
                dropped, last = dropped + 1, error
                continue
            verdict = _verdict(reply)
            if verdict is not None:
                return verdict
            log.info("judge: no verdict (%.80r)", reply)
        if dropped == self.tries:
            raise ComebaError(f"the judge at {self.url} drops the connection: {type(last).__name__}: {last}")
        return None

    def _post(self, body: dict) -> dict:
        headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {self.key}"} if self.key else {})}
        request = urllib.request.Request(f"{self.url.rstrip('/')}/chat/completions", json.dumps(body).encode(), headers)
        try:
            with urllib.request.urlopen(request, timeout=self.timeout) as response:
                return json.load(response)
        except urllib.error.HTTPError as error:
            if error.code in (408, 429) or error.code >= 500:
                raise TimeoutError(f"HTTP {error.code}") from None
            raise ComebaError(f"the judge at {self.url} refuses: HTTP {error.code} {error.reason}") from None
        except urllib.error.URLError as error:
            if isinstance(error.reason, TimeoutError):
                raise TimeoutError("timed out") from None
            if isinstance(error.reason, ConnectionError) and not isinstance(error.reason, ConnectionRefusedError):
                raise error.reason from None  # while the question was sent
            raise ComebaError(f"the judge at {self.url} cannot be reached: {error.reason}") from None


def _verdict(reply: object) -> bool | None:
    """What a reply says: its first word, unless what follows says the other one, asks, or takes a CORRECT back. Whatever else an
    endpoint's ``content`` may be (null, a list of parts) is no verdict."""
    found = _VERDICT.match(reply) if isinstance(reply, str) else None
    if found is None:
        return None
    right, rest = not found[1], reply[found.end() :]
    other = _INCORRECT if right else _CORRECT
    if "?" in rest or other.search(rest) or (right and _DOUBT.search(rest)):
        return None
    return right


def _whole(line: str) -> list[str]:
    """A file's last line, which has no end: none where it was torn while it was written."""
    try:
        json.loads(line)
    except ValueError:
        if line.startswith(_BEGINS[: len(line)]):
            return []
        raise  # not ours, and no line of it is to be lost
    return [line + "\n"]
