"""The report is shared: it shows no credentials, also of a run whose config.yaml an older version wrote."""

from pathlib import Path

from veripo_fast.report.page import write_report
from veripo_fast.text import without_credentials

OLD = """verifier:
  judge: endpoint
  endpoint_url: https://user:pa55word@judge.example/v1?key=t0ken
data:
  train: [a?b.jsonl]
"""


def test_credentials_in_an_old_configuration_are_not_shown(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(OLD)
    page = Path(write_report(tmp_path, tmp_path / "report.html")).read_text()
    assert "judge.example" in page and "pa55word" not in page and "t0ken" not in page


def test_only_credentials_are_taken_out() -> None:
    plain = "verifier:\n  endpoint_url: http://localhost:8000/v1\ndata:\n  train: [a?b.jsonl, me@home/x#1.mp4]\n"
    assert without_credentials(plain) == plain
    for url in ("'https://a:b@host/v1#k'", '"https://host/v1?k=b"', "https://b@host/v1"):
        assert "host/v1" in without_credentials(f"endpoint_url: {url}\n")
        assert "b@" not in without_credentials(f"endpoint_url: {url}\n").replace("***@", "")
        assert "k" not in without_credentials(f"endpoint_url: {url}\n")  # of the query
