"""What users and existing programs import is what it was."""

import difflib

import public_api


def test_the_public_api_is_that_of_the_file():
    then = public_api.FILE.read_text(encoding="utf-8").splitlines()
    now = public_api.api().splitlines()
    changes = "\n".join(difflib.unified_diff(then, now, "public_api.txt", "the package", n=1))
    assert not changes, (
        f"the public API is not that of tests/public_api.txt:\n{changes}\n"
        "If that is meant, write the file anew with `python tests/public_api.py` and say in "
        "docs/changelog.md what changed for users; otherwise keep the old name or signature"
    )


class Example:
    """A class that has one member of each kind."""

    limit = 3

    def __init__(self, x: int, *, y: str = "a") -> None:
        self.x, self.y = x, y

    @property
    def both(self) -> str:
        return f"{self.x}{self.y}"

    @classmethod
    def made(cls, text: str) -> "Example":
        return cls(int(text))

    @staticmethod
    def idle(a: int = 1) -> int:
        return a

    def run(self, *args: int, **kwargs: int) -> None:
        pass

    def _hidden(self) -> None:
        pass


def test_what_a_class_looks_like(monkeypatch):
    monkeypatch.setattr(Example, "__module__", "pytorch_quant.example")
    assert list(public_api._described("Example", Example)) == [
        "class Example(x, *, y='a')",
        "    property both",
        "    staticmethod idle(a=1)",
        "    limit = 3",
        "    classmethod made(text)",
        "    def run(*args, **kwargs)",
    ]
