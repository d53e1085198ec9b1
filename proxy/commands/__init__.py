"""The commands, each imported by `cli` only when it is named.

Beside `serve` and `demo` they work on the database that the config names, beside a running server. The exceptions:
`check` needs only the config, `schema` not even that, `events` asks a running server, `restore` runs while no server
does, and `copy-database` needs no config.

`cli` lists in which module each command is. `context` has what the others share: the options, the database, and the
forms of their output. `serve` does not use it, because it brings the administration.

Exit codes: 0 for success, 1 if the answer is no (there is no such key, the call would not be admitted), 2 if the
command, the config or the environment is wrong.
"""
