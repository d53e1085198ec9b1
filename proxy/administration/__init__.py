"""What administrators do at run time, and what they look at: users, keys, groups, quotas, grants, counters, the log.

What the package promises:

- A change is one transaction. It is checked against what it results in, and its row in the audit log is written in
  the same transaction. Either all of it is there or nothing.
- Changes wait for each other. With `If-Match` nobody overwrites what somebody else changed meanwhile.
- A change is in force in every process within 2 s, by the version that it raises.
- A trial (`dry_run`) does everything that the change would do and rolls it back.
- Nothing of the file is changed here. What the file has under the same name wins.

What it never does: it knows no HTTP and no command line, and decides about no call. A grant or a quota that is made
here is part of the policy, by which `policy` decides.

Begin with `change`, which every change passes. `directory` has users and keys (`records` is how they are shown,
`words` finds keys in a text), `admin_keys` the keys of administrators, `policy` groups and quotas (`policy_rows` is
how they are stored), `grants` what is added to quotas, and `counters` their reset; `effects` says what a change of
the policy does. The lists are in these modules too, and in `attention`, `refusals`, `in_flight`, `audit` and
`replicas`; `pages`, `search` and `csv` are what lists have in common. `levels` has what metrics state of quotas.
`explain` says why a user is admitted or not. `refresh` brings changes into force in a process, and `upkeep` deletes
old rows.
"""
