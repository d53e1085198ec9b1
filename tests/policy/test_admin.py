"""What an admin may see."""

from proxy.policy.admin import Admin


def test_only_a_manager_is_restricted_to_groups():
    """None means everything, so a manager without groups would have to see nothing."""
    assert Admin("ops").restricted_to is None
    assert Admin("eve", "viewer").restricted_to is None
    assert Admin("max", "manager", ("staff",)).restricted_to == ("staff",)
    assert Admin("mia", "manager").restricted_to == ()
