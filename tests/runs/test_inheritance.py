"""What a run takes from its checkpoint is one table."""

from deebert.hub.run_config import KEYS
from deebert.runs.inheritance import POLICIES, RUNS, Policy


def test_the_table_names_keys_of_a_checkpoint() -> None:
    for key, policies in POLICIES.items():
        assert key.partition(".")[0] in KEYS
        assert len(policies) == len(RUNS)
        for policy in policies:
            assert policy != Policy.KEPT or "." in key
            assert policy not in (Policy.UNNAMED, Policy.MERGED) or "." not in key


def test_a_resumed_run_takes_every_key() -> None:
    resumed = {key for key, policies in POLICIES.items() if policies[RUNS.index("resume")]}
    assert resumed >= set(KEYS)
