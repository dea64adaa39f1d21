"""A judge of your own: any function of question and reasoning, behind the address that `verifier.judge: endpoint` asks.

    veripo synth corpus --train 48 --heldout 24
    python examples/own_judge.py --grpo.steps 10

veripo sends each distinct reasoning once, several at a time, keeps the replies, and never sends the gold answer. In
place of `supported` there may be a model, a service, or a table of what people said.
"""

import json
import re
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import veripo_fast


def supported(reasoning: str) -> str:
    """The answer that a reasoning ends up with: the last letter or number that it names, "none" where it names none."""
    named = re.findall(r"\b(?:[A-D]|\d+(?:\.\d+)?)\b", reasoning)
    return named[-1] if named else "none"


class Server(BaseHTTPRequestHandler):
    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["messages"][-1]["content"]
        reasoning = re.search(r"^(----- \w+ -----)\n(.*)\n\1$", asked, re.DOTALL | re.MULTILINE)[2]
        verdict = json.dumps({"supported_answer": supported(reasoning)})
        reply = json.dumps({"choices": [{"message": {"role": "assistant", "content": verdict}}]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(reply)))
        self.end_headers()
        self.wfile.write(reply)

    def log_message(self, *_):
        """Requests are not shown: they would tear up the progress bar."""


if __name__ == "__main__":
    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    options = ["--verifier.judge", "endpoint", "--verifier.endpoint-model", "own",
               "--verifier.endpoint-url", f"http://127.0.0.1:{server.server_port}/v1"]
    tiny = Path(__file__).parents[1] / "configs" / "tiny.yaml"
    veripo_fast.train(veripo_fast.load_config(tiny, [*options, *sys.argv[1:]]))
