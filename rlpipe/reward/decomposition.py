"""Long prompts as yes/no questions (DSG): where the questions of a prompt come from, and which depend on which.

A file of questions is JSONL, one prompt a line, found by the prompt's `id` or by its text, which must not be another's
where a line has both:

    {"prompt": "a red dog on a mat", "questions": [
        {"id": 1, "question": "Is there a dog?"}, {"id": 2, "question": "Is the dog red?", "parents": [1]}]}

or DPG-Bench's csv, one question a row. A text model behind HTTP writes the questions of prompts that no file has.
"""

from __future__ import annotations

import argparse
import csv
import fcntl
import json
import logging
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlpipe.paths import resolve_path
from rlpipe.reward.endpoint import Endpoint, EndpointSettings, ServerError
from rlpipe.types import Prompt

log = logging.getLogger(__name__)

INSTRUCTION = """Break the description of an image into its smallest facts: each object, each number of objects, each \
attribute, each relation, the style. Ask one question about each fact that is answered with yes exactly if an image \
shows it. A question about an attribute or a relation of an object depends on the question whether that object is \
there: put the numbers of the questions that it depends on into "parents".

Answer with a JSON list and nothing else. For the description "two red birds on a branch, watercolor":
[{"id": 1, "question": "Are there birds?", "parents": []},
 {"id": 2, "question": "Are there exactly two birds?", "parents": [1]},
 {"id": 3, "question": "Are the birds red?", "parents": [1]},
 {"id": 4, "question": "Is there a branch?", "parents": []},
 {"id": 5, "question": "Are the birds on the branch?", "parents": [1, 4]},
 {"id": 6, "question": "Is this a watercolor?", "parents": []}]

The description: """
CSV_COLUMNS = ("item_id", "text", "proposition_id", "dependency", "question_natural_language")


@dataclass(frozen=True, slots=True)
class Question:
    """One yes/no question about an image; `parents` are ids of questions without whose yes it makes no sense."""

    id: str
    text: str
    parents: tuple[str, ...] = ()
    category: str | None = None


Questions = tuple[Question, ...]
"""All questions about one prompt, parents before their children."""


def in_order(questions: Sequence[Question]) -> Questions:
    """The questions, parents first, otherwise as they come; ValueError for an id that is missing or taken, or a
    question that depends on itself."""
    by_id = {q.id: q for q in questions}
    if len(by_id) != len(questions):
        raise ValueError("two questions have the same id; give each its own")
    unknown = sorted({p for q in questions for p in q.parents} - set(by_id))
    if unknown:
        raise ValueError(f"parent {unknown[0]!r} is the id of no question")
    placed: dict[str, Question] = {}

    def place(question: Question, below: frozenset[str]) -> None:
        if question.id in below:
            raise ValueError(f"question {question.id!r} depends on itself through its parents")
        for parent in question.parents:
            if parent not in placed:
                place(by_id[parent], below | {question.id})
        placed.setdefault(question.id, question)

    for question in questions:
        place(question, frozenset())
    return tuple(placed.values())


def parse_questions(rows: Any) -> Questions:
    """The questions of a JSON list; ValueError says what is wrong with it."""
    if not isinstance(rows, list) or not rows:
        raise ValueError(f"questions is {rows!r}; give a list of objects such as {{'id': 1, 'question': 'Is ...?'}}")
    questions = []
    for row in rows:
        text = row.get("question") if isinstance(row, Mapping) else None
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"{row!r} has no text `question`")
        parents = row.get("parents") or []
        if not isinstance(parents, list):
            raise ValueError(f"parents is {parents!r}; give a list of ids")
        name = str(row.get("id", len(questions) + 1))
        category = row.get("category")
        questions.append(
            Question(name, text.strip(), tuple(map(str, parents)), None if category is None else str(category))
        )
    return in_order(questions)


def masked(questions: Questions, p_yes: Sequence[float]) -> list[float]:
    """P(yes) of each question, 0 where a parent is answered with no (at most 0.5) or is 0 itself for that reason
    (DPG-Bench's rule, which there holds only as far as parents come before their children)."""
    right: dict[str, bool] = {}
    values = []
    for question, p in zip(questions, p_yes, strict=True):
        counts = all(right[parent] for parent in question.parents)
        right[question.id] = counts and p > 0.5
        values.append(p if counts else 0.0)
    return values


class QuestionBook:
    """The questions of many prompts, by id and by text.

    book = QuestionBook("questions.jsonl")
    book.find(prompt)                           # (Question("1", "Is there a dog?"), ...), or None
    """

    def __init__(self, path: str | Path | None = None) -> None:
        """ValueError names file and line of the first rows that cannot be used."""
        self._by_id: dict[str, tuple[str | None, Questions]] = {}
        self._by_text: dict[str, Questions] = {}
        if path is not None:
            file = resolve_path(path)
            if not file.is_file() or file.suffix not in (".jsonl", ".csv"):
                raise ValueError(f"questions: {file} is no .jsonl or .csv file; give one")
            problems = self._read_csv(file) if file.suffix == ".csv" else self._read_jsonl(file)
            if problems:
                raise ValueError(f"questions: {'; '.join(problems[:3])}" + (", ..." if len(problems) > 3 else ""))

    def find(self, prompt: Prompt) -> Questions | None:
        """The questions about a prompt: those of its id, unless they are about another text, else those of its text."""
        text = plain(prompt.text)
        about, questions = self._by_id.get(prompt.id, (None, None))
        return questions if questions and about in (None, text) else self._by_text.get(text)

    def other_text(self, prompt: Prompt) -> str | None:
        """What the questions with the prompt's id are about, where that is not its text."""
        about = self._by_id.get(prompt.id, (None, None))[0]
        return about if about != plain(prompt.text) else None

    def add(self, questions: Questions, name: str | None = None, text: str | None = None) -> None:
        """Questions that are kept under an id and a text, unless there are some already."""
        if name is not None:
            self._by_id.setdefault(name, (None if text is None else plain(text), questions))
        if text is not None:
            self._by_text.setdefault(plain(text), questions)

    def _read_jsonl(self, file: Path) -> list[str]:
        problems = []
        for number, line in enumerate(file.read_text(encoding="utf-8").split("\n"), 1):
            if line.strip():
                try:
                    self.add_row(json.loads(line))
                except ValueError as error:
                    problems.append(f"{file}:{number}: {error}")
        return problems

    def add_row(self, row: Any) -> None:
        """One object of a JSONL file; ValueError if it is none."""
        name, text = (row.get("id"), row.get("prompt")) if isinstance(row, Mapping) else (None, None)
        if name is None and not isinstance(text, str):
            raise ValueError("no `prompt` or `id` that says whose questions these are")
        self.add(parse_questions(row.get("questions")), None if name is None else str(name), text)

    def _read_csv(self, file: Path) -> list[str]:
        """DPG-Bench's table: consecutive rows of one item are its questions."""
        with open(file, encoding="utf-8-sig", newline="") as stream:
            reader = csv.DictReader(stream)
            lacking = [name for name in CSV_COLUMNS if name not in (reader.fieldnames or ())]
            if lacking:
                return [f"{file}: no column {lacking[0]}; DPG-Bench's table has {', '.join(CSV_COLUMNS)}"]
            items: dict[tuple[str, str], list[Question]] = {}
            for row in reader:
                parents = [p.strip() for p in row["dependency"].split(",")]
                question = Question(
                    row["proposition_id"].strip(),
                    row["question_natural_language"].strip(),
                    tuple(p for p in parents if p not in ("", "0")),
                    row.get("category_broad") or None,
                )
                items.setdefault((row["item_id"], row["text"]), []).append(question)
        problems = []
        for (name, text), questions in items.items():
            try:
                self.add(in_order(questions), name, text)
            except ValueError as error:
                problems.append(f"{file}: item {name}: {error}")
        return problems


class QuestionWriter:
    """A text model that writes the questions of a prompt, once: a JSONL file keeps them, shared by all replicas.

    book:     where the questions are kept besides.
    cache:    the file; of several rows of one prompt the first counts, so that replicas that asked at the same time
              agree.
    settings: of `endpoint.EndpointSettings`, and max_tokens, the length limit of an answer.
    """

    def __init__(self, book: QuestionBook, cache: str | Path, max_tokens: int = 2048, **settings: Any) -> None:
        self.endpoint = Endpoint(EndpointSettings(**settings))
        self.book, self.max_tokens, self.cache = book, max_tokens, Path(cache).expanduser()
        self.cache.parent.mkdir(parents=True, exist_ok=True)
        self.failures: dict[str, str] = {}
        """Prompt text -> why there are no questions about it, as of the last time that they were asked for."""
        self._lock = threading.Lock()
        self._read_to = 0
        self._share([])

    def write(self, prompts: Sequence[Prompt]) -> None:
        """Asks for the questions about those prompts that have none; what fails is in `failures`."""
        with self._lock:
            if any(self.book.find(p) is None for p in prompts):
                self._share([])  # Another replica may have asked.
            wanted = list(dict.fromkeys(plain(p.text) for p in prompts if self.book.find(p) is None))
            if wanted:
                with ThreadPoolExecutor(min(len(wanted), self.endpoint.settings.concurrency)) as pool:
                    self._share([row for row in pool.map(self._ask, wanted) if row is not None])

    def _ask(self, text: str) -> dict[str, Any] | None:
        try:
            answer = self.endpoint.chat(INSTRUCTION + text, max_tokens=self.max_tokens)
            questions = parse_questions(_json_list(answer))
        except (ServerError, ValueError) as error:
            self.failures[text] = f"no questions from {self.endpoint.settings.model}: {error}"
            return None
        self.failures.pop(text, None)
        rows = [{"id": q.id, "question": q.text, "parents": list(q.parents)} for q in questions]
        return {"prompt": text, "questions": rows}

    def _share(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Puts rows at the end of the file, then takes over what is new in it, in its order."""
        with open(self.cache, "a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(self._read_to)
            lines = file.read()
            torn = bool(lines) and not lines.endswith(b"\n")  # Whoever wrote it was killed.
            added = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
            file.write((b"\n" if torn else b"") + added)
            self._read_to = file.tell()
        for line in (lines + (b"\n" if torn else b"") + added).split(b"\n"):
            if line.strip():
                try:
                    self.book.add_row(json.loads(line))
                except ValueError as error:
                    log.warning("%s: a row that cannot be used is left out: %s", self.cache, error)


def plain(text: str) -> str:
    """The text with single blanks, by which prompts are compared."""
    return " ".join(text.split())


def _json_list(answer: str) -> Any:
    """The JSON list in a model's answer, whatever it says around it."""
    start, end = answer.find("["), answer.rfind("]")
    try:
        return json.loads(answer[start : end + 1] if 0 <= start < end else answer)
    except json.JSONDecodeError as error:
        raise ValueError(f"the answer is no JSON list ({error.msg}): {plain(answer)[:80]!r}") from None


def write_file(prompts: Sequence[Prompt], cache: str | Path, **settings: Any) -> Iterator[str]:
    """Questions about all prompts into a file, to be read before they are used; yields what failed, a line each."""
    writer = QuestionWriter(QuestionBook(), cache, **settings)
    at_once = 4 * writer.endpoint.settings.concurrency
    for start in range(0, len(prompts), at_once):
        writer.write(prompts[start : start + at_once])
        yield from (f"{text!r}: {reason}" for text, reason in writer.failures.items())
        writer.failures.clear()


def main() -> None:
    """Write a file of questions from the command line; prompts that have some in it are left out."""
    from rlpipe.data.prompts import load_prompts

    parser = argparse.ArgumentParser(description="Ask a text model for the yes/no questions about prompts.")
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--url", required=True, help="of an OpenAI-compatible server, with /v1")
    parser.add_argument("--model", required=True)
    parser.add_argument("--api-key-env", help="environment variable that holds the key")
    args = parser.parse_args()
    prompts = load_prompts(args.prompts)
    failed = 0
    for line in write_file(prompts, args.out, url=args.url, model=args.model, api_key_env=args.api_key_env):
        failed += 1
        print(line)
    print(f"questions about {len(prompts) - failed} of {len(prompts)} prompts are in {args.out}")


if __name__ == "__main__":
    main()
