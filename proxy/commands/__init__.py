"""The commands for users, keys and reports. They work beside a running server, on the database that the config names.

`directory` has `keys`, `users` and `whoami`, `admin_keys` has `admin-keys`, and `reports` has `usage` and `explain`.
`context` has what they share: the options, the database, and the forms of their output. `cli` imports a module only
when one of its commands is named.

Exit codes: 0 for success, 1 if the answer is no (there is no such key, the call would not be admitted), 2 if the
command, the config or the environment is wrong.
"""
