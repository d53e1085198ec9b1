"""Turns quotas.yaml into a policy, a catalog, users and settings, and reloads it while the proxy runs.

What the package promises:

- A file with any mistake gives no policy. `BadConfig` carries one report with every mistake, each with its line and
  what to write instead.
- A reload replaces the whole policy at once, or leaves the running one in force. A call keeps the policy that
  admitted it.
- No secret appears in a report: what came through `${…}` is redacted, and keys in plain text are never quoted.

What it never does: it does not read the environment by itself (the caller passes it in), decides nothing about a call
(see `policy`), and does not touch the database.

Begin with `loader`, which reads a file in these steps: `document` (YAML to data with lines, with `interpolation` of
`${…}`), `schema` and `catalog` (every key, its type and its description) with the types of single values in
`section`, their rules in `values` and the texts of mistakes in `messages` (`suggestions` finds what was probably
meant), and at the end the checks across sections. `environment_proxy` says which proxy the environment names for an
upstream. `lint` warns about a valid file that probably does not do what it seems to. `overlay` adds what
administrators have made at run time, and `reload` keeps the policy in force. `unresolved` loads a text without
reading the secrets that it names, and a file of whose secrets some can't be read. `json_schema` writes what editors
and the documentation need.
"""
