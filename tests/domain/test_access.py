from app.domain.access import LOCAL, METRICS, NETWORK, TOKEN, Caller, CallerKind, Role


def person(*, issuer: str = "https://idp.example", subject: str = "u-1", name: str = "ada") -> Caller:
    return Caller(CallerKind.PERSON, Role.VIEWER, name, issuer=issuer, subject=subject)


def key(key_id: str, name: str = "ada") -> Caller:
    return Caller(CallerKind.KEY, Role.VIEWER, name, key_id=key_id)


class TestPrincipal:
    def test_stays_when_the_name_changes(self) -> None:
        assert person(name="ada").principal == person(name="ada.lovelace").principal
        assert key("1", name="ada").principal == key("1", name="nightly").principal

    def test_is_of_one_caller_only(self) -> None:
        callers = [
            *(LOCAL, TOKEN, NETWORK, METRICS),
            *(key("1"), key("2")),
            *(person(), person(subject="u-2"), person(issuer="https://other.example")),
        ]

        assert len({caller.principal for caller in callers}) == len(callers)
        assert (LOCAL.principal, key("1").principal, person().principal) == (
            "local",
            "key:1",
            "person:https://idp.example#u-1",
        )
