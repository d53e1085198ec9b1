"""Who is calling: from the headers of a request to a user, with the user's groups, or to an admin.

What the package promises:

- A request without a valid key raises `InvalidKey` (401), whatever its headers contain.
- A change of users or keys in the database is in force within 2 s, in every process that reaches the database.
- If the database can't be reached, nobody is identified whom the process does not remember, and nobody is told that a
  key is wrong which may be right: that is a 503.
- Keys are compared by their SHA-256 only, over their full length. No key is stored, logged or repeated in an answer.
- An unknown key and the key of a user who no longer exists get the same answer, so that keys cannot be probed.
- A request never gets a user of one version of the file and the policy of another.
- A user is a source and an id. Nobody becomes a user of another source by a name; only the file or an administrator
  links two of them.

What it never does: it does not decide what a user may use (see `policy`), and reads no header but those of keys, of
the header sources of the configuration, `X-Forwarded-For` and `X-Quota-Tag`.

Begin with `authentication`: `Authentication.identify` says who is calling. `keys` reads the key from the headers,
`header_sources` the user whom a trusted proxy names, `client_address` the address behind proxies, and `directory` has
the users.
"""
