"""The Rollout-Aware Verifier: checks and a judge read the rollouts, and contrastive pairs come out."""

from veripo_fast.verifier.account import Account
from veripo_fast.verifier.judges import Judge, Judgement
from veripo_fast.verifier.store import read_pairs, verify_files, write_result
from veripo_fast.verifier.verify import VerifierResult, make_judge, verify

__all__ = ["Account", "Judge", "Judgement", "VerifierResult", "make_judge",
           "read_pairs", "verify", "verify_files", "write_result"]
