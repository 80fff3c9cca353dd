"""What a check found, and what each check is about."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

PASS, FAIL, SKIP = "pass", "fail", "skip"

#: check → what it shows. The order is the one they run in.
ABOUT: Mapping[str, str] = {
    "entry-point": "its entry point loads, and every hook that it has exists",
    "light-import": "it imports in less than 50 ms and without heavy modules",
    "declarations": "name, summary, distribution, family, schemes, formats and requires are valid",
    "missing-modules": "without what it requires it still loads and is listed as not usable here",
    "reject": "reject() reads no weights and answers every question with a reason or None",
    "quantizes": "a tiny random model is quantized, and stored exactly as the method returned it",
    "exports": "a tiny random model is exported, with the format, size and sha256 that were said",
    "opens": "the opened artifact computes the logits of qhub's reference",
    "exact": "the codes, scales and zeros read back from the artifact are the model's",
    "generates": "generate() goes on with the most likely token, past stop tokens if asked to",
    "deterministic": "done twice, it gives the same bytes",
    "resumable": "killed with -9 in the middle and resumed, it gives the same bytes",
    "clean-errors": "damaged weights end in a clear error, not in a model",
    "no-network": "nothing it does touches the network",
    "no-stray-files": "it writes only into the folders that it is given",
    "no-output": "it prints nothing on stdout, where data goes",
}


@dataclass(frozen=True, slots=True)
class Check:
    """One check of one component: `outcome` is pass, fail or skip; `reason` says why it failed or was skipped."""

    name: str
    component: str
    outcome: str
    reason: str = ""
    seconds: float = 0.0

    @property
    def about(self) -> str:
        """What the check shows, in one line."""
        return ABOUT[self.name]


class CheckFailedError(Exception):
    """What a check found is wrong; the message is its reason."""


class CheckSkippedError(Exception):
    """A check that cannot be made here; the message is its reason."""
