"""The attacks of `attacks.py`, for some seconds; for ten minutes with `--thorough`."""

import attacks
import pytest

pytestmark = pytest.mark.slow


def test_no_attack_leads_to_a_wrong_result_or_a_traceback(request):
    outcomes = attacks.attack(seconds=600 if request.config.getoption("--thorough") else 6, seed=0)
    print(attacks.described(outcomes))
    assert all(outcome.tried for outcome in outcomes.values())
    assert not any(outcome.wrong or outcome.tracebacks for outcome in outcomes.values()), attacks.described(outcomes)


def test_what_goes_wrong_is_reported(tmp_path, monkeypatch):
    for error, where in ((AssertionError("mine"), "wrong"), (KeyError("mine"), "tracebacks")):

        def case(rng, place, error=error):
            raise error

        monkeypatch.setitem(attacks.CASES, "streams", case)
        outcome = attacks.attack(0.01, seed=0, kinds=["streams"])["streams"]
        assert outcome.tried == len(getattr(outcome, where)) >= 1
        assert "mine" in attacks.described({"streams": outcome})
