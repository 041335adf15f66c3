"""What a check of a model found, property by property."""

from dataclasses import asdict, dataclass
from typing import Any

HOLDS, SAID, FAILED, BROKE = "holds", "said", "failed", "broke"
"""``said``: a limit of the model that Ratel names to the user and keeps to, such as one document a
row; ``failed``: a result was wrong; ``broke``: there was none, for an error."""

TITLES = {
    "loading": "loading gives what from_pretrained gives",
    "gradients": "loss and gradients in fp32",
    "bf16": "loss and gradients in bf16",
    "packed": "documents that share a row",
    "causal": "a token sees nothing that comes after it",
    "step": "a step moves what has a gradient, and nothing else",
    "resume": "a run that is resumed ends as one that was not interrupted",
    "export": "transformers reads the export back as it was trained",
    "own loss": "an object with a loss_fn: loss and gradients in fp32",
}


@dataclass(frozen=True, kw_only=True)
class Finding:
    """``about``: a key of TITLES. ``outcome``: holds, said, failed or broke."""

    about: str
    outcome: str
    detail: str = ""

    def describe(self) -> str:
        return f"{self.outcome:6}  {TITLES[self.about]}" + (f": {self.detail}" if self.detail else "")


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What was found of one class and task. ``refused``: why Ratel does not train it; then nothing
    was found out."""

    name: str
    task: str
    findings: tuple[Finding, ...] = ()
    refused: str | None = None
    seconds: float = 0.0

    @property
    def failed(self) -> tuple[Finding, ...]:
        return tuple(finding for finding in self.findings if finding.outcome in (FAILED, BROKE))

    @property
    def wrong(self) -> tuple[Finding, ...]:
        """The findings with a result that is not right; an error tells of itself."""
        return tuple(finding for finding in self.findings if finding.outcome == FAILED)

    @property
    def is_right(self) -> bool:
        """Whether the class is trained, and nothing failed."""
        return self.refused is None and not self.failed

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "Verdict":
        return cls(**{**content, "findings": tuple(Finding(**finding) for finding in content["findings"])})


def one_line(error: BaseException, limit: int = 300) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= limit else f"{text[: limit - 1]}…"
