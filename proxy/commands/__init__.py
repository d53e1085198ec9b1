"""The commands beside those of `cli`.

They work on the database that the config names, beside a running server. The exceptions: `check` needs only the
config, `events` asks a running server, `restore` runs while no server does, and `copy-database` needs no config.

`directory` has `keys`, `users` and `whoami`, `admin_keys` has `admin-keys`, `counters` has `grant`, `grants` and
`reset`, `backup` has `backup`, `restore` and `copy-database`, and `reports` has `usage`, `explain` and `audit`; the
others are named like their command. `context` has what they share: the options, the database, and the forms of their
output. `cli` imports a module only when one of its commands is named.

Exit codes: 0 for success, 1 if the answer is no (there is no such key, the call would not be admitted), 2 if the
command, the config or the environment is wrong.
"""
