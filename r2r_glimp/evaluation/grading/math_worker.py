"""Runs as a process: compares answers that come as lines of JSON. Its parent keeps the time."""

import json
import logging
import resource
import sys

_MEMORY = 2 * 2**30  # a tower of powers asks for more than there is


def main() -> None:
    """Say `ready`, then one word for each line."""
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    replies, sys.stdout = sys.stdout, sys.stderr  # whatever a library prints is no reply
    from math_verify import parse, verify

    logging.disable()
    print("ready", file=replies, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        gold, answer = (
            parse(f"\\boxed{{{request[key]}}}", parsing_timeout=None) for key in ("gold", "answer")
        )
        if not gold:
            reply = "the known answer cannot be parsed"
        elif not answer:
            reply = "unparsable"
        else:
            reply = "right" if verify(gold, answer, timeout_seconds=None) else "wrong"
        print(reply, file=replies, flush=True)


if __name__ == "__main__":
    main()
