"""A load test with faults: many clients use up a quota, some disconnect, and the proxy is killed and paused.

It promises a verdict. What each client received, what the upstream generated and what the proxy charged in its
database are compared call by call, and every difference that breaks a promise of the proxy is counted in the report.
The same seed makes the same calls.

It never imports the proxy's own code, except `policy.windows`, which parses the `per` of a quota. The proxy under
test is a process that it starts, talks to over HTTP, and whose database it reads with SQL of its own. So a bug in
the proxy can't hide itself from the verdict. It never touches a database that already contains the proxy's tables.

Begin reading in `run`, which starts everything and collects the evidence, and go on with `verdict`, which compares
it. `plan` generates the calls from the seed, `clients` makes them and `answers` reads what they receive. `upstream`
is the simulated upstream, `process` runs the proxy, `replicas` injects the faults; `evidence` has the records,
`database` reads the proxy's rows, `report` prints, `cli` is the command.
"""
