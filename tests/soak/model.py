"""What is right: the content that exists, and what an answer to a request for it may be; asks nobody."""

import random
import re
from dataclasses import dataclass, field

from harness.clients import Response
from harness.content import content_path, zip_of

MB = 1_000_000
NOTHING = content_path("xdelta000000001_To_000000002.dax")
"""A path that no upstream has."""


@dataclass(frozen=True, slots=True)
class Content:
    """One file. `versions`: its bodies, the newest last; more than one for an index file only."""

    path: str
    versions: list[bytes] = field(default_factory=list, repr=False)

    @property
    def body(self) -> bytes:
        return self.versions[-1]

    @property
    def etag(self) -> str:
        return f'"{len(self.versions)}-{len(self.body)}"'


def contents(seed: int) -> list[Content]:
    """Deltas, fulls and an index file, in the sizes of the field."""
    chance = random.Random(seed)
    found = {"/content/ContentInfo.txt": chance.randbytes(4000)}
    for number in range(60):
        path = content_path(f"xdelta2607{number:03}_To_260801001.dax")
        found[path] = chance.randbytes(chance.randint(1, 600_000))
    for number in range(8):
        path = content_path("full.zip", revision=f"26080{number:04}")
        found[path] = zip_of(f"{seed}/{number}", chance.randint(2 * MB, 12 * MB))
    return [Content(path, [body]) for path, body in found.items()]


LIE_BYTES = 7
"""An upstream that lies of a body's length says so much more."""


def lengths_told(body: bytes) -> tuple[int, ...]:
    """What clients may be told of its length: an upstream's lie shows at the body's end only."""
    return len(body), len(body) + LIE_BYTES


class WrongError(AssertionError):
    """An answer that must never be."""


@dataclass(frozen=True, slots=True)
class Question:
    """One request of a client. `span`: the range asked for, start and stop."""

    content: Content | None
    method: str = "GET"
    span: tuple[int, int] | None = None
    if_none_match: str | None = None
    leave_after_bytes: int | None = None

    def __str__(self) -> str:
        return f"{self.method} {self.path} {self.headers}"

    @property
    def path(self) -> str:
        return self.content.path if self.content is not None else NOTHING

    @property
    def headers(self) -> dict[str, str]:
        fields = {}
        if self.span:
            fields["Range"] = f"bytes={self.span[0]}-{self.span[1] - 1}"
        if self.if_none_match is not None:
            fields["If-None-Match"] = self.if_none_match
        return fields


def question(chance: random.Random, all_contents: list[Content], etags: dict[str, str]) -> Question:
    """What a client may come to ask."""
    if chance.random() < 0.02:
        return Question(None)
    content = chance.choice(all_contents)
    length = len(content.body)
    kind = chance.random()
    if kind < 0.45:
        return Question(content)
    if kind < 0.55:
        return Question(content, leave_after_bytes=chance.randint(0, length))
    if kind < 0.65:
        return Question(content, "HEAD")
    if kind < 0.75:
        return Question(content, if_none_match=etags.get(content.path, '"none"'))
    start, stop = sorted(chance.sample(range(length + 1), 2)) if length else (0, 1)
    return Question(content, span=(start, stop))


TROUBLE = (502, 503, 504)
"""Statuses that tell of trouble, allowed while somebody makes trouble."""


def judge(asked: Question, answer: Response) -> str:
    """One word for what it was: right, trouble or cut. WrongError when it must not be."""
    if answer.status in TROUBLE:
        told = answer.status != 503 or answer.header("retry-after") is not None
        return _must(told, answer, "503 without Retry-After") and "trouble"
    if asked.content is None:
        return _must(answer.status == 404, answer, "404 is right")
    if answer.status == 416:
        shortest = min(map(len, asked.content.versions))
        return _must(asked.span is not None and asked.span[0] >= shortest, answer, "the range is there")
    if answer.status == 304:
        return _must(asked.if_none_match is not None, answer, "nothing was conditional")
    return _judge_content(asked, asked.content, answer)


def _judge_content(asked: Question, content: Content, answer: Response) -> str:
    if asked.method == "HEAD":
        told = int(answer.header("content-length") or -1)
        lengths = [length for body in content.versions for length in lengths_told(body)]
        return _must(answer.status == 200 and told in lengths, answer, "HEAD")
    if answer.status == 206:
        return _judge_span(asked, content, answer)
    _must(answer.status == 200, answer, "200 is right")
    if answer.complete:
        return _must(answer.body in content.versions, answer, "a whole body with other bytes")
    begins = any(body.startswith(answer.body) for body in content.versions)
    _must(begins, answer, "a cut body with other bytes")
    return "cut"


def _judge_span(asked: Question, content: Content, answer: Response) -> str:
    _must(asked.span is not None, answer, "no range was asked for")
    found = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", answer.header("content-range") or "")
    _must(found is not None, answer, "Content-Range")
    start, stop, total = int(found[1]), int(found[2]) + 1, int(found[3])
    bodies = [body for body in content.versions if total in lengths_told(body)]
    right = any(body[start : start + len(answer.body)] == answer.body for body in bodies)
    _must(right, answer, "a span with other bytes")
    _must(not answer.complete or len(answer.body) == stop - start, answer, "a short span")
    return "right" if answer.complete else "cut"


def _must(condition: bool, answer: Response, why: str) -> str:
    if not condition:
        fields = [field for field in answer.fields if field[0] != "date"]
        raise WrongError(f"{why}: status {answer.status}, {len(answer.body)} bytes, {fields}")
    return "right"
