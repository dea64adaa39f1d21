"""Whether a checkpoint's chat template ends: it is a program of its author's, and transformers' sandbox bounds no loop.

A short prompt is rendered once in a child process that the kernel stops: no thread can be, nor an integer of a billion
digits. The child runs this file alone, which therefore imports nothing of ours and no torch (0.1 s); it knows the
extensions of transformers, so that the same templates parse. A template that loops only for some longer text is not
found.
"""

from __future__ import annotations

import json
import resource
import signal
import subprocess
import sys
from functools import lru_cache

CPU_SECONDS = 5
MEMORY_BYTES = 1 << 30
LONGEST_TEXT = 1 << 20
"""Characters; Qwen's templates write a few hundred."""
_WALL_SECONDS = 120
"""For a template that sleeps, or a machine that is very busy."""
_NO_MEMORY, _TOO_LONG = 3, 4


@lru_cache
def template_problem(template: str) -> str:
    """Why the template must not be used; "" when it may be, or when it fails at once, which using it will say."""
    try:
        child = subprocess.run([sys.executable, "-P", __file__], input=json.dumps(template).encode(),
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=_WALL_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return f"takes more than {_WALL_SECONDS} s for a prompt of three words"
    if child.returncode in (-signal.SIGXCPU, -signal.SIGKILL):
        return f"takes more than {CPU_SECONDS} s for a prompt of three words"
    if child.returncode == _NO_MEMORY:
        return f"takes more than {MEMORY_BYTES >> 30} GiB of memory for a prompt of three words"
    if child.returncode == _TOO_LONG:
        return f"writes more than {LONGEST_TEXT} characters for a prompt of three words"
    if child.returncode < 0:
        return f"ends its process with signal {-child.returncode}"
    return ""


def _render(template: str) -> None:
    from jinja2.exceptions import TemplateError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}`, which marks what the assistant wrote."""

        tags = {"generation"}  # noqa: RUF012 (jinja's own form)

        def parse(self, parser):  # type: ignore[no-untyped-def]
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def refuse(message: str) -> None:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                                extensions=[Generation, loopcontrols])
    environment.filters["tojson"] = lambda value, **options: json.dumps(value)
    environment.globals |= {"raise_exception": refuse, "strftime_now": str}
    compiled = environment.from_string(template)
    for media in ([], ["image"], ["video"], ["image", "video", "video"]):
        content = [*({"type": kind} for kind in media), {"type": "text", "text": "What moves here?"}]
        text = compiled.render(messages=[{"role": "system", "content": [{"type": "text", "text": "Answer."}]},
                                         {"role": "user", "content": content}], tools=None, documents=None,
                               add_generation_prompt=True)
        if len(text) > LONGEST_TEXT:
            sys.exit(_TOO_LONG)


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS + 1))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        _render(json.load(sys.stdin))
    except MemoryError:
        sys.exit(_NO_MEMORY)
