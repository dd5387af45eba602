import pytest

from app.api.language import negotiate
from app.domain.texts import Language


@pytest.mark.parametrize(
    ("header", "language"),
    [
        (None, Language.EN),
        ("", Language.EN),
        ("de", Language.DE),
        ("zh-Hans-CN", Language.ZH),
        ("ZH-tw", Language.ZH),
        ("fr", Language.EN),
        ("fr, de;q=0.1", Language.DE),
        ("en;q=0.8, de;q=0.9", Language.DE),
        ("zh, de", Language.ZH),
        ("de;q=0, zh;q=0.001", Language.ZH),
        ("*", Language.EN),
        ("*;q=0.5, zh;q=0.4", Language.EN),
        ("de;q=x", Language.EN),
        ("de ; q=0.7 , zh;q=0.6", Language.DE),
        (";;;,,,q=", Language.EN),
        ("de" + ",fr" * 10_000, Language.DE),
    ],
)
def test_picks_the_language_of_the_highest_quality(header: str | None, language: Language) -> None:
    assert negotiate(header) is language
