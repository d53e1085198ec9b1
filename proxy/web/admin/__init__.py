"""The admin listener: the API for administrators under `/admin/api`, metrics, and health.

What the package promises:

- Without a valid admin key or the cookie of a login nobody learns or changes anything, except that the process lives,
  and its metrics. A user's key, and headers of trusted sources, give no access.
- A web page of another origin changes nothing with the cookie of an administrator who visits it, and reads nothing by
  a name that leads to this listener (DNS rebinding).
- Every error is a problem (RFC 9457) that names the wrong field. None has a key, or the text of an exception.
- What the OpenAPI document says is what validates: both are made from the same rows.

What it never does: it changes nothing by itself. Each change is a function of `administration`.

Begin with `operations`: a resource is a class with handlers and a row for each of them, and `resource` its base.
`application` puts the listener together, `access` says who is asking (`failures` slows down who guesses), `problems`
writes the errors, and `openapi` the document. The resources: `session`, `directory` (users, keys), `admin_keys`,
`quotas` (groups, quotas, grants), `counters` (and attention, refusals, calls in flight, explanations), `reports`
(usage, models, upstreams, replicas, the policy in force, the audit log, events) with `policy_check`.
"""
