#!/usr/bin/env python3
"""Asks a server that is already running, and compares its greedy answers with those that were recorded.

    python3 smoke_test.py [--url http://127.0.0.1:8000] [--wait SECONDS]

Reads smoke.json beside it; needs Python 3.9 and nothing else, starts nothing. An answer passes when it begins with the
recorded text, which ends before the first token that rounding could change; where nothing was recorded, when it is not
empty. Exit codes: 0 all passed, 1 an answer is wrong, 2 the server does not answer.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a server here, not what a proxy makes of it


def ask(url: str, body: Any = None, timeout: float = 300) -> Any:
    """The JSON of an answer, or its text where it is none."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data=data, headers={"Content-Type": "application/json"})
    with OPENER.open(request, timeout=timeout) as answer:
        text = answer.read().decode()
    try:
        return json.loads(text)
    except ValueError:
        return text


def wait_until_ready(url: str, seconds: float) -> None:
    """Raises what the last attempt raised."""
    end = time.monotonic() + seconds
    while True:
        try:
            ask(url, timeout=10)
            return
        except OSError:
            if time.monotonic() >= end:
                raise
            time.sleep(1)


def found_answer(document: Any, keys: list[Any]) -> str:
    if isinstance(document, list) and document and keys and isinstance(keys[0], str):
        document = document[0]  # some servers put one answer into a list
    for key in keys:
        document = document[key]
    return str(document)


def failure_of(case: dict[str, Any], answer: str) -> str | None:
    """Why an answer is wrong; None when it is right."""
    prompt, expected = case["prompt"], case["expected"]
    if answer.startswith(prompt):  # some servers repeat the question
        answer = answer[len(prompt) :]
    if not answer.strip():
        return "the answer is empty"
    if answer.lstrip().startswith(expected.lstrip()):
        return None
    return f"expected it to begin with {expected.lstrip()!r}, got {answer.lstrip()!r}"


def main() -> int:
    parser = argparse.ArgumentParser(description="Compare a running server's greedy answers with recorded ones.")
    document = json.loads(Path(__file__).with_name("smoke.json").read_text(encoding="utf-8"))
    parser.add_argument("--url", default=document["url"], help="of the server [default: %(default)s]")
    parser.add_argument("--wait", type=float, default=0, help="seconds to wait for it to be ready [default: 0]")
    options = parser.parse_args()
    url = options.url.rstrip("/")
    try:
        wait_until_ready(url + document["ready"], options.wait)
    except OSError as error:
        print(f"{url}{document['ready']}: no answer ({error}); start the server with launch.sh, or pass --wait")
        return 2
    failures = 0
    for number, case in enumerate(document["cases"], 1):
        name = f"{number}/{len(document['cases'])} {case['model']}"
        try:
            failure = failure_of(case, found_answer(ask(url + case["path"], case["body"]), case["answer"]))
        except urllib.error.HTTPError as error:
            failure = f"{case['path']}: {error} {error.read().decode(errors='replace')[:500]}"
        except OSError as error:
            print(f"{name}: {url}{case['path']}: no answer ({error})")
            return 2
        except (KeyError, IndexError, TypeError) as error:
            failure = f"{case['path']}: no text at {case['answer']} ({type(error).__name__}: {error})"
        print(f"{name}: {'ok' if failure is None else 'WRONG: ' + failure}")
        failures += failure is not None
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
